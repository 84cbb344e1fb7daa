-- Several instances may start at once: one of them creates the tables, the others wait.
SELECT pg_advisory_xact_lock(7001);

CREATE TABLE IF NOT EXISTS account (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    owner   text   NOT NULL,
    balance bigint NOT NULL CHECK (balance >= 0)
);

CREATE TABLE IF NOT EXISTS transfer (
    id     uuid   PRIMARY KEY, -- chosen by the client
    payer  bigint NOT NULL REFERENCES account,
    payee  bigint NOT NULL REFERENCES account,
    amount bigint NOT NULL CHECK (amount > 0),
    made   timestamptz NOT NULL DEFAULT now(),
    CHECK (payer <> payee)
);
