-- Version 4: fal's own prices, what calls really cost, and who does the daily work.
CREATE TABLE fal_prices (
    fal_price_id    INTEGER PRIMARY KEY,
    model           TEXT    NOT NULL,
    unit            TEXT    NOT NULL,
    unit_price_usd  TEXT,
    standing        TEXT    NOT NULL CHECK (standing IN ('priced', 'placeholder', 'unpriced', 'gone')),
    source          TEXT    NOT NULL,
    seen_at         INTEGER NOT NULL,
    CHECK (standing NOT IN ('priced', 'placeholder') OR unit_price_usd IS NOT NULL)
) STRICT;
CREATE INDEX fal_prices_by_model ON fal_prices (model, fal_price_id);

CREATE TABLE observed_costs (
    model           TEXT    NOT NULL,
    up_to_micros    INTEGER NOT NULL CHECK (up_to_micros > 0),
    calls           INTEGER NOT NULL CHECK (calls >= 0),
    over_hold       INTEGER NOT NULL CHECK (over_hold >= 0),
    last_call_id    INTEGER NOT NULL REFERENCES calls,
    PRIMARY KEY (model, up_to_micros)
) STRICT, WITHOUT ROWID;

CREATE TABLE hold_raises (
    raise_id        INTEGER PRIMARY KEY,
    model           TEXT    NOT NULL,
    percent         INTEGER NOT NULL CHECK (percent > 100),
    created_at      INTEGER NOT NULL
) STRICT;
CREATE INDEX hold_raises_by_model ON hold_raises (model, raise_id);

CREATE TABLE timers (
    name            TEXT    PRIMARY KEY,
    due_at          INTEGER NOT NULL,
    claimed_until   INTEGER NOT NULL,
    done_at         INTEGER
) STRICT;
CREATE TRIGGER fal_prices_are_immutable BEFORE UPDATE ON fal_prices
BEGIN SELECT RAISE(ABORT, 'fal prices are appended to, never changed'); END;
CREATE TRIGGER fal_prices_are_kept BEFORE DELETE ON fal_prices
BEGIN SELECT RAISE(ABORT, 'fal prices are never deleted'); END;
