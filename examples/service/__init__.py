"""A small HTTP service with a pool of PostgreSQL connections. Start it with ``python -m service``."""
