-- Version 5: fal's billing events beside the calls.
ALTER TABLE calls ADD COLUMN adjusted_micros INTEGER NOT NULL DEFAULT 0;
ALTER TABLE calls ADD COLUMN billed_units TEXT;
CREATE INDEX calls_by_request ON calls (fal_request_id) WHERE fal_request_id IS NOT NULL;
CREATE TABLE unexplained_events (
    request_id      TEXT    PRIMARY KEY,
    model           TEXT    NOT NULL,
    units           TEXT    NOT NULL,
    cost_nano_usd   INTEGER NOT NULL,
    happened_at     INTEGER NOT NULL,
    seen_at         INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX unexplained_events_by_model ON unexplained_events (model, happened_at);
CREATE TABLE bookmarks (
    name            TEXT    PRIMARY KEY,
    reached_at      INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
