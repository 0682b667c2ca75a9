-- Version 9: a call's refunds and adjustments, found without reading the ledger.
CREATE INDEX entries_of_calls ON entries (call_id) WHERE call_id IS NOT NULL AND kind <> 'charge';
