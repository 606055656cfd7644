-- What a hold is for does not change, its lease included; but a user who is erased gives way to the name that stands for them.

CREATE OR REPLACE FUNCTION refuse_illegal_hold() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    erased boolean := false;
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.state <> 'reserved' THEN
            RAISE EXCEPTION 'a hold begins as reserved, not as %', NEW.state USING ERRCODE = 'restrict_violation';
        END IF;
    ELSE
        erased := OLD.state <> 'reserved' AND NEW.user_id LIKE 'erased-%' AND OLD.user_id NOT LIKE 'erased-%'
            AND (NEW.api_key_id = OLD.api_key_id OR NEW.api_key_id LIKE 'erased-%');
        IF (NEW.hold_id, NEW.tenant, NEW.operation_id, NEW.attempt, NEW.provider, NEW.model, NEW.price_id, NEW.lease_id,
            NEW.input_tokens_max, NEW.output_tokens_max, NEW.output_tokens_wanted, NEW.amount_nanousd, NEW.created_at)
            IS DISTINCT FROM
           (OLD.hold_id, OLD.tenant, OLD.operation_id, OLD.attempt, OLD.provider, OLD.model, OLD.price_id, OLD.lease_id,
            OLD.input_tokens_max, OLD.output_tokens_max, OLD.output_tokens_wanted, OLD.amount_nanousd, OLD.created_at)
            OR ((NEW.user_id, NEW.api_key_id) IS DISTINCT FROM (OLD.user_id, OLD.api_key_id) AND NOT erased) THEN
            RAISE EXCEPTION 'what a hold is for does not change: %', OLD.hold_id USING ERRCODE = 'restrict_violation';
        ELSIF NEW.state = OLD.state THEN
            -- Only how long an open hold lives may change without a move.
            IF (NEW.resolved_at, NEW.cost_nanousd, NEW.estimated, NEW.input_tokens, NEW.output_tokens, NEW.cache_read_tokens,
                NEW.cache_write_tokens, NEW.cache_write_1h_tokens, CASE WHEN NEW.state <> 'reserved' THEN NEW.expires_at END)
               IS DISTINCT FROM
               (OLD.resolved_at, OLD.cost_nanousd, OLD.estimated, OLD.input_tokens, OLD.output_tokens, OLD.cache_read_tokens,
                OLD.cache_write_tokens, OLD.cache_write_1h_tokens, CASE WHEN OLD.state <> 'reserved' THEN OLD.expires_at END) THEN
                RAISE EXCEPTION 'a hold that is % changes by a move only: %', OLD.state, OLD.hold_id USING ERRCODE = 'restrict_violation';
            END IF;
        ELSIF erased OR (OLD.state, NEW.state)
            NOT IN (('reserved', 'settled'), ('reserved', 'voided'), ('reserved', 'expired'), ('expired', 'reconciled')) THEN
            RAISE EXCEPTION 'a hold that was % is not %: %', OLD.state, NEW.state, OLD.hold_id USING ERRCODE = 'restrict_violation';
        END IF;
    END IF;
    IF NEW.state IN ('reserved', 'voided', 'expired')
        AND (NEW.input_tokens, NEW.output_tokens, NEW.cache_read_tokens, NEW.cache_write_tokens, NEW.cost_nanousd)
            <> (0, 0, 0, 0, (CASE NEW.state WHEN 'expired' THEN NEW.amount_nanousd ELSE 0 END)) THEN
        RAISE EXCEPTION 'a hold that is % does not cost or use that: %', NEW.state, NEW.hold_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;
