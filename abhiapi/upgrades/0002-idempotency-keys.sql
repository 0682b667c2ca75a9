-- Version 2: answers kept under the caller's Idempotency-Key.
CREATE TABLE idempotency_keys (
    account_id      INTEGER NOT NULL REFERENCES accounts,
    digest          BLOB    NOT NULL CHECK (length(digest) = 32),
    request_digest  BLOB    NOT NULL CHECK (length(request_digest) = 32),
    call_id         INTEGER NOT NULL REFERENCES calls,
    status          INTEGER,
    headers         TEXT,
    body            BLOB,
    created_at      INTEGER NOT NULL,
    PRIMARY KEY (account_id, digest),
    CHECK ((status IS NULL) = (headers IS NULL) AND (status IS NULL) = (body IS NULL))
) STRICT;
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
