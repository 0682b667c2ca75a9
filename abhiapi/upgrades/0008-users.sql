-- Version 8: people who sign in to the dashboard, and the links that invite them.
CREATE TABLE users (
    user_id         INTEGER PRIMARY KEY,
    account_id      INTEGER REFERENCES accounts,
    email           TEXT    NOT NULL UNIQUE CHECK (length(email) BETWEEN 3 AND 254 AND email = lower(email)),
    password_hash   TEXT    CHECK (password_hash LIKE '$argon2id$%'),
    is_operator     INTEGER NOT NULL DEFAULT 0 CHECK (is_operator IN (0, 1)),
    session_epoch   INTEGER NOT NULL DEFAULT 1,
    created_at      INTEGER NOT NULL,
    last_login_at   INTEGER,
    CHECK (account_id IS NOT NULL OR is_operator = 1)
) STRICT;
CREATE INDEX users_by_account ON users (account_id);
CREATE TABLE invites (
    digest          BLOB    PRIMARY KEY CHECK (length(digest) = 32),
    email           TEXT    NOT NULL CHECK (length(email) BETWEEN 3 AND 254 AND email = lower(email)),
    account_id      INTEGER REFERENCES accounts,
    is_operator     INTEGER NOT NULL DEFAULT 0 CHECK (is_operator IN (0, 1)),
    purpose         TEXT    NOT NULL DEFAULT 'password' CHECK (purpose IN ('password', 'demo')),
    created_at      INTEGER NOT NULL,
    expires_at      INTEGER NOT NULL,
    used_at         INTEGER,
    CHECK (account_id IS NOT NULL OR is_operator = 1)
) STRICT, WITHOUT ROWID;
CREATE INDEX invites_by_email ON invites (email);
