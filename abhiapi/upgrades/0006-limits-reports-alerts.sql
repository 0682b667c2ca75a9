-- Version 6: spending limits of keys, roll-ups for long reports, alerts.
CREATE TABLE key_limits (
    limit_id           INTEGER PRIMARY KEY,
    day_limit_micros   INTEGER CHECK (day_limit_micros >= 0),
    month_limit_micros INTEGER CHECK (month_limit_micros >= 0),
    created_at         INTEGER NOT NULL
) STRICT;
CREATE TABLE key_spending (
    limit_id        INTEGER NOT NULL REFERENCES key_limits,
    period          TEXT    NOT NULL CHECK (length(period) IN (7, 10)),
    spent_micros    INTEGER NOT NULL CHECK (spent_micros >= 0),
    PRIMARY KEY (limit_id, period)
) STRICT, WITHOUT ROWID;
ALTER TABLE keys ADD COLUMN limit_id INTEGER REFERENCES key_limits;
ALTER TABLE keys ADD COLUMN models TEXT;
CREATE INDEX keys_by_limit ON keys (limit_id) WHERE limit_id IS NOT NULL;
ALTER TABLE accounts ADD COLUMN alert_below_micros INTEGER;
CREATE TABLE usage_monthly (
    month             TEXT    NOT NULL,
    account_id        INTEGER NOT NULL REFERENCES accounts,
    key_id            INTEGER NOT NULL REFERENCES keys,
    calls             INTEGER NOT NULL CHECK (calls >= 0),
    charged_micros    INTEGER NOT NULL CHECK (charged_micros >= 0),
    fal_cost_nano_usd INTEGER NOT NULL CHECK (fal_cost_nano_usd >= 0),
    PRIMARY KEY (month, account_id, key_id)
) STRICT, WITHOUT ROWID;
CREATE TABLE usage_totals (
    day               INTEGER NOT NULL,
    model             TEXT    NOT NULL,
    calls             INTEGER NOT NULL CHECK (calls >= 0),
    charged_micros    INTEGER NOT NULL CHECK (charged_micros >= 0),
    fal_cost_nano_usd INTEGER NOT NULL CHECK (fal_cost_nano_usd >= 0),
    PRIMARY KEY (day, model)
) STRICT, WITHOUT ROWID;
CREATE TABLE alerts (
    alert_id      INTEGER PRIMARY KEY,
    kind          TEXT    NOT NULL,
    subject       TEXT    NOT NULL,
    message       TEXT    NOT NULL,
    raised_at     INTEGER NOT NULL,
    cleared_at    INTEGER,
    announced_at  INTEGER,
    delivered_at  INTEGER,
    tries         INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE UNIQUE INDEX alerts_standing ON alerts (kind, subject) WHERE cleared_at IS NULL;
CREATE INDEX alerts_to_announce ON alerts (alert_id) WHERE announced_at IS NULL;
CREATE INDEX alerts_to_deliver ON alerts (alert_id) WHERE delivered_at IS NULL AND tries < 5;
INSERT INTO usage_monthly
SELECT strftime('%Y-%m', day * 86400, 'unixepoch'), account_id, key_id,
       SUM(calls), SUM(charged_micros), SUM(fal_cost_nano_usd)
FROM usage_daily GROUP BY 1, 2, 3;
INSERT INTO usage_totals
SELECT day, model, SUM(calls), SUM(charged_micros), SUM(fal_cost_nano_usd) FROM usage_daily GROUP BY day, model;
