CREATE TABLE playground_keys (
    account_id      INTEGER PRIMARY KEY REFERENCES accounts,
    key_id          INTEGER NOT NULL UNIQUE REFERENCES keys
) STRICT;
