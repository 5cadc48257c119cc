"""Where every message and every reply stands, on disk before anything else happens.

Reading order: schema, rows, journal, upkeep, database, storage.
"""
