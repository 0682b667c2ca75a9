-- Version 7: what open jobs asked for.
CREATE TABLE job_inputs (
    call_id         INTEGER PRIMARY KEY REFERENCES calls,
    document        BLOB    NOT NULL CHECK (length(document) <= 4096)
) STRICT;
CREATE TRIGGER job_inputs_go_with_their_hold AFTER UPDATE OF state ON calls
WHEN NEW.mode = 'queue' AND NEW.state IN ('settled', 'released')
BEGIN DELETE FROM job_inputs WHERE call_id = NEW.call_id; END;
