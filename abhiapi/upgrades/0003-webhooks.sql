-- What customers asked to be told when a job has ended (fal_webhook on a submit), and how telling them goes.
CREATE TABLE webhooks (
    call_id         INTEGER PRIMARY KEY REFERENCES calls,
    account_id      INTEGER NOT NULL REFERENCES accounts,
    url             TEXT    NOT NULL CHECK (length(url) BETWEEN 1 AND 2048),  -- without its query once payload is gone
    -- waiting: for the payload; due: to be delivered; delivered and failed: ends, from which only the operator resends.
    state           TEXT    NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'due', 'delivered', 'failed')),
    attempts        INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),  -- to deliver; while waiting: to make the payload
    -- waiting: when the job ended, or when it is looked at again; due: when it is tried; whoever works on a row moves
    -- it into the future. NULL: the job still runs, or nothing more is tried.
    next_attempt_at INTEGER,
    last_status     INTEGER,                          -- of the customer's answer; NULL: none came
    last_error      TEXT,                             -- NULL: none
    created_at      INTEGER NOT NULL,
    ended_at        INTEGER,                          -- delivered or failed; NULL: neither
    payload         BLOB,                             -- NULL: not made yet, or dropped some days after the end
    CHECK ((state IN ('delivered', 'failed')) = (ended_at IS NOT NULL)),
    CHECK (state <> 'due' OR (payload IS NOT NULL AND next_attempt_at IS NOT NULL))
) STRICT;
CREATE INDEX webhooks_by_account ON webhooks (account_id);
CREATE INDEX webhooks_waiting ON webhooks (next_attempt_at) WHERE state = 'waiting' AND next_attempt_at IS NOT NULL;
CREATE INDEX webhooks_due ON webhooks (account_id, next_attempt_at) WHERE state = 'due';
CREATE INDEX webhooks_kept ON webhooks (ended_at) WHERE payload IS NOT NULL AND ended_at IS NOT NULL;
CREATE TRIGGER webhooks_follow_their_job AFTER UPDATE OF state ON calls
WHEN NEW.mode = 'queue' AND OLD.state <> NEW.state AND NEW.state IN ('settled', 'released', 'unknown')
BEGIN
    UPDATE webhooks SET next_attempt_at = coalesce(NEW.finished_at, NEW.created_at)
    WHERE call_id = NEW.call_id AND state = 'waiting' AND next_attempt_at IS NULL;
END;
