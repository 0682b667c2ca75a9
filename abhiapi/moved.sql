-- What a ledger becomes that was moved to another database (`abhiapi migrate-to`): it says where to, and takes no more.
-- The triggers stop whoever had opened it before.
CREATE TABLE moved (
    to_name         TEXT    NOT NULL,                 -- the new place, without a password
    move            TEXT    NOT NULL                  -- the new place knows this move by it
) STRICT;
CREATE TRIGGER moved_accounts BEFORE UPDATE ON accounts
BEGIN SELECT RAISE(ABORT, 'this ledger was moved'); END;
CREATE TRIGGER moved_new_accounts BEFORE INSERT ON accounts
BEGIN SELECT RAISE(ABORT, 'this ledger was moved'); END;
CREATE TRIGGER moved_keys BEFORE UPDATE ON keys
BEGIN SELECT RAISE(ABORT, 'this ledger was moved'); END;
CREATE TRIGGER moved_new_keys BEFORE INSERT ON keys
BEGIN SELECT RAISE(ABORT, 'this ledger was moved'); END;
CREATE TRIGGER moved_calls BEFORE UPDATE ON calls
BEGIN SELECT RAISE(ABORT, 'this ledger was moved'); END;
CREATE TRIGGER moved_new_calls BEFORE INSERT ON calls
BEGIN SELECT RAISE(ABORT, 'this ledger was moved'); END;
CREATE TRIGGER moved_new_entries BEFORE INSERT ON entries
BEGIN SELECT RAISE(ABORT, 'this ledger was moved'); END;
CREATE TRIGGER moved_new_processes BEFORE INSERT ON processes
BEGIN SELECT RAISE(ABORT, 'this ledger was moved'); END;
CREATE TRIGGER moved_new_prices BEFORE INSERT ON own_prices
BEGIN SELECT RAISE(ABORT, 'this ledger was moved'); END;
CREATE TRIGGER moved_new_users BEFORE INSERT ON users
BEGIN SELECT RAISE(ABORT, 'this ledger was moved'); END;
CREATE TRIGGER moved_users BEFORE UPDATE ON users
BEGIN SELECT RAISE(ABORT, 'this ledger was moved'); END;
