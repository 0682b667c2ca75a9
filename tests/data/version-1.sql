-- A database as version 1 left it, with every kind of row. Never changed: upgrades start from here.
BEGIN TRANSACTION;
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
    created_at      INTEGER NOT NULL
) STRICT;
INSERT INTO "accounts" VALUES(1,'ann','free','active',971000,52500,5,X'C05C835A9AAD0CF7D2C76AB758AAEED8F209225232188F9DD8E50F05227E15F7',1795000000000);
INSERT INTO "accounts" VALUES(2,'bob','free','active',5000,0,1,X'ED4B6EB24862EF14FF3C01195E9EEDCAF5AA9BC87703980198BB5B9881DDDF61',1795000000000);
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
    CHECK ((state IN ('settled', 'released')) = (finished_at IS NOT NULL)),
    CHECK (state = 'settled' OR charged_micros = 0)
) STRICT;
INSERT INTO "calls" VALUES(1000000,1,1,1,1,'sync','settled',26250,26250,250,NULL,'1','fal',NULL,25000000,NULL,1795000060000,1795000000000,1795000000000);
INSERT INTO "calls" VALUES(1000001,1,1,1,1,'sync','settled',26250,10000,0,NULL,'1','fal',NULL,25000000,NULL,1795086460000,1795086400000,1795086400000);
INSERT INTO "calls" VALUES(1000002,1,1,1,1,'sync','held',26250,0,0,NULL,NULL,NULL,NULL,NULL,NULL,1795086460000,1795086400000,NULL);
INSERT INTO "calls" VALUES(1000003,1,1,1,1,'queue','sent',26250,0,0,200,NULL,NULL,'0190-job',NULL,NULL,1795086460000,1795086400000,NULL);
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
INSERT INTO "entries" VALUES(1,1,'topup',1000000,1000000,NULL,NULL,NULL,1795000000000,X'B80FC6024266CE2B71BD6C43F830197057F8025D1BCEE86D7E5AD0E7AEC5ED50');
INSERT INTO "entries" VALUES(1,2,'charge',-26250,973750,1000000,NULL,NULL,1795000000000,X'212326875F09F752701F3F26D06CF4E82FBF3A824F2ED65CF0A96F70643F42F5');
INSERT INTO "entries" VALUES(1,3,'charge',-10000,963750,1000001,NULL,NULL,1795086400000,X'8AF3F75AF483E738D6670BC5C24F7523191D8286F5F10B1C7C6D3D4B84D45763');
INSERT INTO "entries" VALUES(1,4,'refund',250,964000,1000000,NULL,NULL,1795086400000,X'B7353BF4CC35D1F42E7F583390632943401B296E84C6827CA353998033A423E0');
INSERT INTO "entries" VALUES(1,5,'topup',7000,971000,NULL,'paid','cash',1795086400000,X'C05C835A9AAD0CF7D2C76AB758AAEED8F209225232188F9DD8E50F05227E15F7');
INSERT INTO "entries" VALUES(2,1,'topup',5000,5000,NULL,NULL,NULL,1795000000000,X'ED4B6EB24862EF14FF3C01195E9EEDCAF5AA9BC87703980198BB5B9881DDDF61');
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
    replaces_key_id INTEGER REFERENCES keys                               -- NULL: not made by a rotation
) STRICT;
INSERT INTO "keys" VALUES(1,1,X'AFA1F3CA846A70A4D010D4121405E9B89C9F94A4C4C4C8FC0F4FEFAC9B2510A0','rB3v',NULL,'active',1795000000000,NULL,NULL,NULL);
INSERT INTO "keys" VALUES(2,2,X'BCF3D51B86FD13888FC809ABFD26176B6F8027FEED7E6BC228EC82D4D9E9DC47','Aec5',NULL,'active',1795000000000,NULL,NULL,NULL);
CREATE TABLE own_prices (
    own_price_id    INTEGER PRIMARY KEY,
    model           TEXT    NOT NULL,
    unit            TEXT,                             -- NULL: fal's
    unit_price_usd  TEXT,                             -- NULL: fal's price and a margin
    margin          TEXT,                             -- NULL: an absolute price, or the general margin
    hold_micros     INTEGER CHECK (hold_micros >= 0), -- NULL: computed from the call's input
    created_at      INTEGER NOT NULL
) STRICT;
INSERT INTO "own_prices" VALUES(1,'fal-ai/flux/dev',NULL,NULL,'0.2',NULL,1795086400000);
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
INSERT INTO "price_versions" VALUES(1,'fal-ai/flux/dev','megapixels','0.02625','0.025','P, L',1795000000000);
CREATE TABLE processes (
    process_id      INTEGER PRIMARY KEY,
    pid             INTEGER NOT NULL,
    started_at      INTEGER NOT NULL,
    seen_at         INTEGER NOT NULL,                 -- last proof that the database takes writes
    ended_at        INTEGER                           -- NULL: running, or killed and not yet noticed
) STRICT;
INSERT INTO "processes" VALUES(1,4194305,1795000000000,1795000000000,NULL);
INSERT INTO "processes" VALUES(2,4194305,1795000000000,1795000000000,NULL);
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
INSERT INTO "usage_daily" VALUES(1,20775,'fal-ai/flux/dev',1,1,26000,25000000);
INSERT INTO "usage_daily" VALUES(1,20776,'fal-ai/flux/dev',1,1,10000,25000000);
CREATE INDEX keys_by_account ON keys (account_id);
CREATE INDEX own_prices_by_model ON own_prices (model, own_price_id);
CREATE INDEX calls_by_account ON calls (account_id);
CREATE INDEX calls_open ON calls (process_id) WHERE state IN ('held', 'sent', 'unknown');
CREATE UNIQUE INDEX calls_one_job ON calls (fal_request_id) WHERE mode = 'queue' AND fal_request_id IS NOT NULL;
CREATE UNIQUE INDEX entries_one_charge ON entries (call_id) WHERE kind = 'charge';
CREATE UNIQUE INDEX entries_one_ref ON entries (account_id, ref) WHERE ref IS NOT NULL;
CREATE INDEX usage_by_day ON usage_daily (day);
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
CREATE TRIGGER calls_are_kept BEFORE DELETE ON calls
BEGIN SELECT RAISE(ABORT, 'calls are never deleted'); END;
CREATE TRIGGER calls_end_once BEFORE UPDATE OF state, charged_micros ON calls
WHEN OLD.state IN ('settled', 'released')
BEGIN SELECT RAISE(ABORT, 'a hold ends exactly once'); END;
CREATE TRIGGER accounts_are_kept BEFORE DELETE ON accounts
BEGIN SELECT RAISE(ABORT, 'accounts are never deleted'); END;
COMMIT;
PRAGMA application_id = 1094862921;
PRAGMA user_version = 1;
