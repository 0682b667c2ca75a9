"""Books as they are after a busy year, written straight into the tables: what pages and reports must stay quick on."""

from __future__ import annotations

from contextlib import closing

from abhiapi.db import Database

DAYS, MODELS, KEYS = 365, 20, 3
DAY_MS = 86_400_000
CHARGE_MICROS = 26_250

# A price for each of the models, the keys, then the calls evenly over the year, each with its charge, and the roll-up.
_SCRIPT = """
CREATE TEMP TABLE numbers AS
WITH RECURSIVE counted (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM counted WHERE n + 1 < {calls})
SELECT n, {now_ms} - 60000 - (n * {days} * {day_ms} / {calls}) AS created FROM counted;

INSERT INTO processes (process_id, pid, started_at, seen_at, ended_at) VALUES (1000000, 1, 1, 1, 1);

INSERT INTO price_versions (price_id, model, unit, unit_price_usd, fal_unit_price_usd, source, first_used_at)
SELECT 1000000 + n, 'fal-ai/made-up/model-' || n, 'images', '0.02625', '0.025', 'crowd', 1
FROM numbers WHERE n < {models};

INSERT INTO keys (key_id, account_id, digest, last_four, name, status, created_at)
SELECT 1000000 + n, {account}, randomblob(32), printf('%04d', n), 'key ' || n, 'active', 1
FROM numbers WHERE n < {keys};

INSERT INTO calls (call_id, account_id, key_id, price_id, process_id, mode, state, held_micros, charged_micros,
                   http_status, units, usage_source, fal_request_id, fal_cost_nano_usd,
                   deadline_at, created_at, finished_at)
SELECT (created << 20) + n % 1048576, {account}, 1000000 + n % {keys}, 1000000 + n % {models}, 1000000,
       'sync', 'settled', {charge}, {charge}, 200, '1', 'fal',
       printf('%016x-%d', n * 2654435761 % 4294967296, n), 25000000, created, created, created
FROM numbers;

INSERT INTO entries (account_id, seq, kind, amount_micros, balance_after_micros, call_id, created_at, hash)
SELECT {account}, row_number() OVER (ORDER BY call_id), 'charge', -{charge},
       -{charge} * row_number() OVER (ORDER BY call_id), call_id, created_at, randomblob(32)
FROM calls WHERE account_id = {account} AND price_id >= 1000000;

UPDATE accounts SET last_seq = {calls}, balance_micros = -{charge} * {calls} WHERE account_id = {account};

INSERT INTO usage_daily (account_id, day, model, key_id, calls, charged_micros, fal_cost_nano_usd)
SELECT account_id, finished_at / {day_ms}, model, key_id, count(*), sum(charged_micros), sum(fal_cost_nano_usd)
FROM calls JOIN price_versions USING (price_id) WHERE account_id = {account} AND price_id >= 1000000
GROUP BY 1, 2, 3, 4;
"""


def fill(database: Database, account_id: int, *, calls: int, now_ms: int) -> None:
    """A year of charged calls for an account without entries. The hashes are not right, so nothing here verifies."""
    numbers = {"days": DAYS, "models": MODELS, "keys": KEYS, "day_ms": DAY_MS, "charge": CHARGE_MICROS}
    script = _SCRIPT.format(account=account_id, calls=calls, now_ms=now_ms, **numbers)
    with closing(database.connect(busy_timeout_s=60)) as connection:
        connection.executescript(f"BEGIN IMMEDIATE; {script} COMMIT; ANALYZE;")
