-- Erase one user: content goes, money stays under a name drawn at random, which nothing leads back from.
--   unknown   there is no such user, or not any more
--   busy      money is set aside for the user's answers: when they are done, ask again
--   erased    done
-- All or nothing. A user of the same id who comes afterwards is a new one. The books know accounts only by their hold.
CREATE FUNCTION erase_user(p_tenant text, p_user text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    pseudonym text := 'erased-' || gen_random_uuid();
    keys text[];
    pseudonyms text[];
BEGIN
    -- The row is what every new hold, operation and turn of the user refers to: none can come in between.
    PERFORM 1 FROM users WHERE tenant = p_tenant AND user_id = p_user FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 'unknown';
    END IF;
    IF EXISTS (SELECT FROM holds WHERE tenant = p_tenant AND user_id = p_user AND state = 'reserved') THEN
        RETURN 'busy';
    END IF;
    SELECT coalesce(array_agg(key_id), '{}'), coalesce(array_agg('erased-' || gen_random_uuid()), '{}') INTO keys, pseudonyms
    FROM api_keys WHERE tenant = p_tenant AND user_id = p_user;
    INSERT INTO users (tenant, user_id) VALUES (p_tenant, pseudonym);

    DELETE FROM turns WHERE tenant = p_tenant AND user_id = p_user;
    DELETE FROM sessions WHERE tenant = p_tenant AND user_id = p_user;
    DELETE FROM subscriptions WHERE tenant = p_tenant AND user_id = p_user;
    DELETE FROM api_keys WHERE tenant = p_tenant AND user_id = p_user;
    DELETE FROM budgets WHERE tenant = p_tenant AND ((scope = 'user' AND subject = p_user) OR (scope = 'key' AND subject = ANY (keys)));

    UPDATE holds
    SET user_id = pseudonym, api_key_id = coalesce(pseudonyms[array_position(keys, api_key_id)], api_key_id)
    WHERE tenant = p_tenant AND user_id = p_user;
    UPDATE spending SET subject = pseudonym WHERE tenant = p_tenant AND scope = 'user' AND subject = p_user;
    UPDATE spending SET subject = pseudonyms[array_position(keys, subject)]
    WHERE tenant = p_tenant AND scope = 'key' AND subject = ANY (keys);
    UPDATE operations
    SET user_id = pseudonym, session_id = '', trace_id = '', cache_source_id = NULL,
        api_key_id = coalesce(pseudonyms[array_position(keys, api_key_id)], api_key_id)
    WHERE tenant = p_tenant AND user_id = p_user;
    UPDATE usage_user_days
    SET user_id = pseudonym, api_key_id = coalesce(pseudonyms[array_position(keys, api_key_id)], api_key_id)
    WHERE tenant = p_tenant AND user_id = p_user;
    DELETE FROM users WHERE tenant = p_tenant AND user_id = p_user;
    RETURN 'erased';
END
$$;
