-- The truth about storage (SQLite). abhiapi/tables.py describes the same tables to SQLAlchemy; test_schema.py
-- compares the two. A change here comes with a numbered step in abhiapi/migrations.py.
--
-- Units: *_micros are integers, 1 USD = 1,000,000 micros, 1 credit = 1,000 micros. *_nano_usd are integers,
-- 1 USD = 1,000,000,000. *_at are integers, milliseconds since 1970-01-01 UTC. Decimals (prices, units) are TEXT,
-- exactly as they were written. No column holds a float, a key, or fal's credential.

CREATE TABLE accounts (
    account_id      INTEGER PRIMARY KEY,
    name            TEXT    NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 64),
    plan            TEXT    NOT NULL DEFAULT 'free' CHECK (plan IN ('free', 'pro')),
    status          TEXT    NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
    -- The sum of the account's entries. Below zero when a charge passed its hold: a debt.
    balance_micros  INTEGER NOT NULL DEFAULT 0 CHECK (balance_micros BETWEEN -9000000000000000 AND 9000000000000000),
    -- The sum of held_micros over the account's open calls.
    held_micros     INTEGER NOT NULL DEFAULT 0 CHECK (held_micros >= 0),
    -- The head of the account's hash chain: seq 0 and an empty hash before the first entry.
    last_seq        INTEGER NOT NULL DEFAULT 0 CHECK (last_seq >= 0),
    last_hash       BLOB    NOT NULL DEFAULT x'',
    created_at      INTEGER NOT NULL,
    -- The operator hears of it when the balance falls below this. NULL: never.
    alert_below_micros INTEGER
) STRICT;

CREATE TABLE keys (
    key_id          INTEGER PRIMARY KEY,
    account_id      INTEGER NOT NULL REFERENCES accounts,
    digest          BLOB    NOT NULL UNIQUE CHECK (length(digest) = 32),  -- SHA-256 of the key; the key is stored nowhere
    last_four       TEXT    NOT NULL CHECK (length(last_four) = 4),       -- for the mask shown to people
    name            TEXT,                                                 -- a label; NULL: none was given
    status          TEXT    NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'disabled', 'revoked')),
    created_at      INTEGER NOT NULL,
    expires_at      INTEGER,                                              -- NULL: never
    last_used_at    INTEGER,                                              -- NULL: never used; kept to the minute
    replaces_key_id INTEGER REFERENCES keys,                              -- NULL: not made by a rotation
    limit_id        INTEGER REFERENCES key_limits,                        -- NULL: spends what the account has
    models          TEXT                              -- the models it may call, patterns with a space between; NULL: any
) STRICT;
CREATE INDEX keys_by_account ON keys (account_id);
CREATE INDEX keys_by_limit ON keys (limit_id) WHERE limit_id IS NOT NULL;

-- The most that a key may spend in a day and a month (UTC). A key and those it is rotated into share one.
CREATE TABLE key_limits (
    limit_id           INTEGER PRIMARY KEY,
    day_limit_micros   INTEGER CHECK (day_limit_micros >= 0),             -- NULL: no limit
    month_limit_micros INTEGER CHECK (month_limit_micros >= 0),           -- NULL: no limit
    created_at         INTEGER NOT NULL
) STRICT;

-- What the calls admitted in a day ('2026-11-22') and a month ('2026-11') hold and were charged, less refunds:
-- moved in the transactions that move the holds, and provable from calls (ledger verify).
CREATE TABLE key_spending (
    limit_id        INTEGER NOT NULL REFERENCES key_limits,
    period          TEXT    NOT NULL CHECK (length(period) IN (7, 10)),
    spent_micros    INTEGER NOT NULL CHECK (spent_micros >= 0),
    PRIMARY KEY (limit_id, period)
) STRICT, WITHOUT ROWID;

-- Every price that any call was ever admitted under, so that each charge can be explained for ever.
CREATE TABLE price_versions (
    price_id            INTEGER PRIMARY KEY,
    model               TEXT    NOT NULL,
    unit                TEXT    NOT NULL,
    unit_price_usd      TEXT    NOT NULL,             -- what the customer pays per unit
    fal_unit_price_usd  TEXT    NOT NULL,             -- what fal charged per unit then; '': not known
    source              TEXT    NOT NULL,             -- where fal's price was read, or 'operator'
    first_used_at       INTEGER NOT NULL,
    UNIQUE (model, unit, unit_price_usd, fal_unit_price_usd, source)
) STRICT;

-- The operator's own prices: only appended to, the newest row of a model counts.
CREATE TABLE own_prices (
    own_price_id    INTEGER PRIMARY KEY,
    model           TEXT    NOT NULL,
    unit            TEXT,                             -- NULL: fal's
    unit_price_usd  TEXT,                             -- NULL: fal's price and a margin
    margin          TEXT,                             -- NULL: an absolute price, or the general margin
    hold_micros     INTEGER CHECK (hold_micros >= 0), -- NULL: computed from the call's input
    created_at      INTEGER NOT NULL
) STRICT;
CREATE INDEX own_prices_by_model ON own_prices (model, own_price_id);

-- What fal itself said of its prices: only appended to, and only where something changed; the newest row of a model
-- counts. standing: priced; placeholder (a number that is no price); unpriced (listed without a usable price); gone
-- (not listed any more; the price is the last there was).
CREATE TABLE fal_prices (
    fal_price_id    INTEGER PRIMARY KEY,
    model           TEXT    NOT NULL,
    unit            TEXT    NOT NULL,
    unit_price_usd  TEXT,                             -- NULL: none that can be used
    standing        TEXT    NOT NULL CHECK (standing IN ('priced', 'placeholder', 'unpriced', 'gone')),
    source          TEXT    NOT NULL,
    seen_at         INTEGER NOT NULL,
    CHECK (standing NOT IN ('priced', 'placeholder') OR unit_price_usd IS NOT NULL)
) STRICT;
CREATE INDEX fal_prices_by_model ON fal_prices (model, fal_price_id);

-- What calls were really charged, by model: a histogram, counted in the transaction that ends the call.
CREATE TABLE observed_costs (
    model           TEXT    NOT NULL,
    up_to_micros    INTEGER NOT NULL CHECK (up_to_micros > 0),  -- the upper bound of the charges counted here
    calls           INTEGER NOT NULL CHECK (calls >= 0),
    over_hold       INTEGER NOT NULL CHECK (over_hold >= 0),    -- those of them that passed their hold
    last_call_id    INTEGER NOT NULL REFERENCES calls,
    PRIMARY KEY (model, up_to_micros)
) STRICT, WITHOUT ROWID;

-- By how much a model's formula fell short of a charge: what later holds are multiplied by. Only appended to.
CREATE TABLE hold_raises (
    raise_id        INTEGER PRIMARY KEY,
    model           TEXT    NOT NULL,
    percent         INTEGER NOT NULL CHECK (percent > 100),
    created_at      INTEGER NOT NULL
) STRICT;
CREATE INDEX hold_raises_by_model ON hold_raises (model, raise_id);

-- Work that is done now and then, by one process at a time.
CREATE TABLE timers (
    name            TEXT    PRIMARY KEY,
    due_at          INTEGER NOT NULL,
    claimed_until   INTEGER NOT NULL,                 -- past: nobody is at it
    done_at         INTEGER,                          -- the last success; NULL: never
    claimed_by      INTEGER                           -- the process that is at it, or was last
) STRICT;

-- Processes that serve or served this database: whose calls may be swept when they are gone.
CREATE TABLE processes (
    process_id      INTEGER PRIMARY KEY,
    pid             INTEGER NOT NULL,
    started_at      INTEGER NOT NULL,
    seen_at         INTEGER NOT NULL,                 -- last proof that the database takes writes
    ended_at        INTEGER                           -- NULL: running, or killed and not yet noticed
) STRICT;

CREATE TABLE calls (
    call_id           INTEGER PRIMARY KEY,            -- milliseconds x 2^20 + chance: sorts by time
    account_id        INTEGER NOT NULL REFERENCES accounts,
    key_id            INTEGER NOT NULL REFERENCES keys,
    price_id          INTEGER NOT NULL REFERENCES price_versions,   -- the price at admission; names the model
    process_id        INTEGER NOT NULL REFERENCES processes,        -- who is working on it
    mode              TEXT    NOT NULL CHECK (mode IN ('sync', 'stream', 'queue')),
    -- held: credit is set aside and fal may have heard of the call; sent: fal accepted the job (queue);
    -- unknown: fal answered but the cost is not known, the hold stands. settled and released are ends.
    state             TEXT    NOT NULL CHECK (state IN ('held', 'sent', 'unknown', 'settled', 'released')),
    held_micros       INTEGER NOT NULL CHECK (held_micros >= 0),    -- as set aside at admission
    charged_micros    INTEGER NOT NULL DEFAULT 0 CHECK (charged_micros >= 0),
    refunded_micros   INTEGER NOT NULL DEFAULT 0 CHECK (refunded_micros BETWEEN 0 AND charged_micros),
    http_status       INTEGER,                        -- fal's status; NULL: no answer seen
    units             TEXT,                           -- as received or computed; NULL: none
    usage_source      TEXT    CHECK (usage_source IN ('fal', 'catalogue', 'events', 'operator')),  -- NULL: nothing charged
    fal_request_id    TEXT,                           -- NULL: fal sent none
    fal_cost_nano_usd INTEGER,                        -- NULL: fal's unit price or the units are not known
    reason            TEXT,                           -- a word on an unusual end; NULL: an ordinary one
    deadline_at       INTEGER NOT NULL,               -- later than any answer can come; past it the hold may be swept
    created_at        INTEGER NOT NULL,
    finished_at       INTEGER,                        -- NULL: still open
    adjusted_micros   INTEGER NOT NULL DEFAULT 0,     -- by how much fal's billing event moved the charge, up or down
    billed_units      TEXT,                           -- as in fal's billing event; NULL: none was seen
    CHECK ((state IN ('settled', 'released')) = (finished_at IS NOT NULL)),
    CHECK (state = 'settled' OR charged_micros = 0)
) STRICT;
CREATE INDEX calls_by_account ON calls (account_id);  -- the rowid, which is the time, follows by itself
CREATE INDEX calls_open ON calls (process_id) WHERE state IN ('held', 'sent', 'unknown');
-- A queued job by fal's id for it: looked up at every poll, and never two calls for one job.
CREATE UNIQUE INDEX calls_one_job ON calls (fal_request_id) WHERE mode = 'queue' AND fal_request_id IS NOT NULL;
CREATE INDEX calls_by_request ON calls (fal_request_id) WHERE fal_request_id IS NOT NULL;  -- fal's events by its id

-- Billing events of fal's that no call explains (yet): looked at again by every comparison.
CREATE TABLE unexplained_events (
    request_id      TEXT    PRIMARY KEY,              -- fal's
    model           TEXT    NOT NULL,
    units           TEXT    NOT NULL,
    cost_nano_usd   INTEGER NOT NULL,
    happened_at     INTEGER NOT NULL,                 -- by fal's clock
    seen_at         INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX unexplained_events_by_model ON unexplained_events (model, happened_at);

-- How far something that goes through time has come.
CREATE TABLE bookmarks (
    name            TEXT    PRIMARY KEY,
    reached_at      INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- The ledger: one immutable row per movement of credit. An account's balance is the sum of its entries.
CREATE TABLE entries (
    account_id           INTEGER NOT NULL REFERENCES accounts,
    seq                  INTEGER NOT NULL CHECK (seq >= 1),         -- 1, 2, 3 ... per account, without gaps
    kind                 TEXT    NOT NULL CHECK (kind IN ('topup', 'charge', 'refund', 'adjustment')),
    amount_micros        INTEGER NOT NULL CHECK (amount_micros <> 0),
    balance_after_micros INTEGER NOT NULL,
    call_id              INTEGER REFERENCES calls,                  -- NULL: no call is meant
    ref                  TEXT,                                      -- the payment's own number; NULL: none
    note                 TEXT,
    created_at           INTEGER NOT NULL,
    hash                 BLOB    NOT NULL CHECK (length(hash) = 32), -- SHA-256(previous hash, this row)
    PRIMARY KEY (account_id, seq),
    CHECK (kind <> 'charge' OR (amount_micros < 0 AND call_id IS NOT NULL)),
    CHECK (kind <> 'refund' OR (amount_micros > 0 AND call_id IS NOT NULL)),
    CHECK (kind <> 'topup' OR amount_micros > 0)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX entries_one_charge ON entries (call_id) WHERE kind = 'charge';
CREATE INDEX entries_of_calls ON entries (call_id) WHERE call_id IS NOT NULL AND kind <> 'charge';
CREATE UNIQUE INDEX entries_one_ref ON entries (account_id, ref) WHERE ref IS NOT NULL;

-- What reports read: counted in the transaction that ends the call, and provable from calls (ledger verify).
CREATE TABLE usage_daily (
    account_id        INTEGER NOT NULL REFERENCES accounts,
    day               INTEGER NOT NULL,               -- days since 1970-01-01 UTC, of the call's end
    model             TEXT    NOT NULL,
    key_id            INTEGER NOT NULL REFERENCES keys,
    calls             INTEGER NOT NULL CHECK (calls >= 0),          -- ended calls, free ones too
    charged_micros    INTEGER NOT NULL CHECK (charged_micros >= 0), -- less refunds
    fal_cost_nano_usd INTEGER NOT NULL CHECK (fal_cost_nano_usd >= 0),
    PRIMARY KEY (account_id, day, model, key_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX usage_by_day ON usage_daily (day);

-- Keys that callers gave their requests (Idempotency-Key), for a day: which call a key stands for, and its answer.
CREATE TABLE idempotency_keys (
    account_id      INTEGER NOT NULL REFERENCES accounts,
    digest          BLOB    NOT NULL CHECK (length(digest) = 32),          -- SHA-256 of the key
    request_digest  BLOB    NOT NULL CHECK (length(request_digest) = 32),  -- SHA-256 of what was asked for under it
    call_id         INTEGER NOT NULL REFERENCES calls,                     -- whose hold was taken with this row
    status          INTEGER,                          -- of the answer as it left; NULL: none is kept (yet)
    headers         TEXT,                             -- a JSON array of [name, value]
    body            BLOB,
    created_at      INTEGER NOT NULL,
    PRIMARY KEY (account_id, digest),
    CHECK ((status IS NULL) = (headers IS NULL) AND (status IS NULL) = (body IS NULL))
) STRICT;
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
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
-- usage_daily added up once more, for reports over all accounts and long times. Moved with it.
CREATE TABLE usage_monthly (
    month             TEXT    NOT NULL,               -- '2026-11', UTC
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

-- What the operator was told of, or is about to be: one row for each time that something began to be wrong.
CREATE TABLE alerts (
    alert_id      INTEGER PRIMARY KEY,
    kind          TEXT    NOT NULL,                   -- low_balance, fal_account, ... (alerts.KINDS)
    subject       TEXT    NOT NULL,                   -- what is wrong: an account's name, a model
    message       TEXT    NOT NULL,
    raised_at     INTEGER NOT NULL,
    cleared_at    INTEGER,                            -- NULL: still so
    announced_at  INTEGER,                            -- in the log and the metrics; NULL: not yet
    delivered_at  INTEGER,                            -- to the webhook; NULL: not (yet)
    tries         INTEGER NOT NULL DEFAULT 0          -- of the webhook
) STRICT;
-- Standing alerts: one of a kind and subject, so that a crossing is told once, whatever restarts.
CREATE UNIQUE INDEX alerts_standing ON alerts (kind, subject) WHERE cleared_at IS NULL;
CREATE INDEX alerts_to_announce ON alerts (alert_id) WHERE announced_at IS NULL;
CREATE INDEX alerts_to_deliver ON alerts (alert_id) WHERE delivered_at IS NULL AND tries < 5;

-- What an open job asked for, where it is short: its answer may name no units, and a restart must not cost the answer.
CREATE TABLE job_inputs (
    call_id         INTEGER PRIMARY KEY REFERENCES calls,
    document        BLOB    NOT NULL CHECK (length(document) <= 4096)  -- the request's body, as it was sent
) STRICT;
CREATE TRIGGER job_inputs_go_with_their_hold AFTER UPDATE OF state ON calls
WHEN NEW.mode = 'queue' AND NEW.state IN ('settled', 'released')
BEGIN DELETE FROM job_inputs WHERE call_id = NEW.call_id; END;

-- People who sign in to the dashboard. They never call with what is in here: that takes a key.
CREATE TABLE users (
    user_id         INTEGER PRIMARY KEY,
    account_id      INTEGER REFERENCES accounts,      -- whose figures they see; NULL: an operator without an account
    email           TEXT    NOT NULL UNIQUE CHECK (length(email) BETWEEN 3 AND 254 AND email = lower(email)),
    password_hash   TEXT    CHECK (password_hash LIKE '$argon2id$%'),  -- NULL: none was set, and none signs in
    is_operator     INTEGER NOT NULL DEFAULT 0 CHECK (is_operator IN (0, 1)),
    session_epoch   INTEGER NOT NULL DEFAULT 1,       -- sessions of an earlier epoch are over
    created_at      INTEGER NOT NULL,
    last_login_at   INTEGER,                          -- NULL: never
    CHECK (account_id IS NOT NULL OR is_operator = 1)
) STRICT;
CREATE INDEX users_by_account ON users (account_id);

-- Links to set a password with. The token in the link is stored nowhere.
CREATE TABLE invites (
    digest          BLOB    PRIMARY KEY CHECK (length(digest) = 32),  -- SHA-256 of the token
    email           TEXT    NOT NULL CHECK (length(email) BETWEEN 3 AND 254 AND email = lower(email)),
    account_id      INTEGER REFERENCES accounts,      -- of the user to be; NULL: an operator without an account
    is_operator     INTEGER NOT NULL DEFAULT 0 CHECK (is_operator IN (0, 1)),
    -- password: once, to set one; demo: signs in by itself until it expires (`serve --sandbox --demo` alone makes it).
    purpose         TEXT    NOT NULL DEFAULT 'password' CHECK (purpose IN ('password', 'demo')),
    created_at      INTEGER NOT NULL,
    expires_at      INTEGER NOT NULL,
    used_at         INTEGER,                          -- NULL: not yet
    CHECK (account_id IS NOT NULL OR is_operator = 1)
) STRICT, WITHOUT ROWID;
CREATE INDEX invites_by_email ON invites (email);

-- The key that the dashboard's playground calls with, for a customer who is signed in. Nobody knows its text.
CREATE TABLE playground_keys (
    account_id      INTEGER PRIMARY KEY REFERENCES accounts,
    key_id          INTEGER NOT NULL UNIQUE REFERENCES keys
) STRICT;

-- What must never happen is refused by the database itself.
CREATE TRIGGER entries_are_immutable BEFORE UPDATE ON entries
BEGIN SELECT RAISE(ABORT, 'ledger entries are never changed'); END;
CREATE TRIGGER entries_are_kept BEFORE DELETE ON entries
BEGIN SELECT RAISE(ABORT, 'ledger entries are never deleted'); END;
CREATE TRIGGER price_versions_are_immutable BEFORE UPDATE ON price_versions
BEGIN SELECT RAISE(ABORT, 'price versions are never changed'); END;
CREATE TRIGGER price_versions_are_kept BEFORE DELETE ON price_versions
BEGIN SELECT RAISE(ABORT, 'price versions are never deleted'); END;
CREATE TRIGGER own_prices_are_immutable BEFORE UPDATE ON own_prices
BEGIN SELECT RAISE(ABORT, 'own prices are appended to, never changed'); END;
CREATE TRIGGER fal_prices_are_immutable BEFORE UPDATE ON fal_prices
BEGIN SELECT RAISE(ABORT, 'fal prices are appended to, never changed'); END;
CREATE TRIGGER fal_prices_are_kept BEFORE DELETE ON fal_prices
BEGIN SELECT RAISE(ABORT, 'fal prices are never deleted'); END;
CREATE TRIGGER calls_are_kept BEFORE DELETE ON calls
BEGIN SELECT RAISE(ABORT, 'calls are never deleted'); END;
CREATE TRIGGER calls_end_once BEFORE UPDATE OF state, charged_micros ON calls
WHEN OLD.state IN ('settled', 'released')
BEGIN SELECT RAISE(ABORT, 'a hold ends exactly once'); END;
CREATE TRIGGER accounts_are_kept BEFORE DELETE ON accounts
BEGIN SELECT RAISE(ABORT, 'accounts are never deleted'); END;
-- Whoever ends a job, its webhook becomes due in the same transaction.
CREATE TRIGGER webhooks_follow_their_job AFTER UPDATE OF state ON calls
WHEN NEW.mode = 'queue' AND OLD.state <> NEW.state AND NEW.state IN ('settled', 'released', 'unknown')
BEGIN
    UPDATE webhooks SET next_attempt_at = coalesce(NEW.finished_at, NEW.created_at)
    WHERE call_id = NEW.call_id AND state = 'waiting' AND next_attempt_at IS NULL;
END;
