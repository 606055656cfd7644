-- What was deleted stays deleted: a turn or a record that was on its way then, and comes afterwards, does not bring it back.

-- Which conversations were deleted, and which users erased, within the last day: longer than any answer runs, and than its turn is tried. Only
-- digests are kept: whoever knows a user and a session can ask whether they are here, and nobody can read them.
CREATE TABLE deleted_sessions (
    tenant     text NOT NULL,
    digest     bytea NOT NULL CHECK (length(digest) = 32),
    deleted_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, digest)
);
CREATE INDEX deleted_sessions_by_age ON deleted_sessions (deleted_at);

-- A conversation as `deleted_sessions` knows it. The session '' stands for all of an erased user.
CREATE FUNCTION digest_of_session(p_tenant text, p_user text, p_session text) RETURNS bytea LANGUAGE sql IMMUTABLE AS $$
    SELECT sha256(convert_to(format('%s %s %s %s %s', length(p_tenant), length(p_user), p_tenant, p_user, p_session), 'UTF8'))
$$;

-- The caller has locked the user.
CREATE FUNCTION note_deletion(p_tenant text, p_user text, p_session text) RETURNS void LANGUAGE sql AS $$
    INSERT INTO deleted_sessions VALUES (p_tenant, digest_of_session(p_tenant, p_user, p_session), clock_timestamp())
    ON CONFLICT (tenant, digest) DO UPDATE SET deleted_at = excluded.deleted_at
$$;

-- Whether a conversation, or its user, was deleted at `p_asked_at` or later. Sure only for who has locked the user.
CREATE FUNCTION deleted_since(p_tenant text, p_user text, p_session text, p_asked_at timestamptz) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM deleted_sessions d
        WHERE d.tenant = p_tenant AND d.deleted_at >= p_asked_at
          AND d.digest IN (digest_of_session(p_tenant, p_user, p_session), digest_of_session(p_tenant, p_user, ''))
    )
$$;

-- As before, but no position too if the conversation or its user was deleted after the question was asked.
CREATE OR REPLACE FUNCTION append_turn(
    p_tenant text, p_user text, p_session text, p_answer_id uuid, p_question text, p_answer text, p_citations jsonb, p_complete boolean,
    p_created_at timestamptz, p_title text, p_replaces uuid, OUT place integer, OUT kept_in text, OUT unsummarised integer
) LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    followed integer;
    known boolean;
BEGIN
    LOOP
        -- The user's answers are looked at and numbered one after the other; different users do not wait for each other.
        PERFORM 1 FROM users WHERE tenant = p_tenant AND user_id = p_user FOR NO KEY UPDATE;
        known := FOUND;
        IF deleted_since(p_tenant, p_user, p_session, p_created_at) THEN
            RETURN;
        END IF;
        EXIT WHEN known;
        PERFORM ensure_user(p_tenant, p_user);
    END LOOP;
    SELECT ordinal, session_id, 0 INTO place, kept_in, unsummarised FROM turns
    WHERE tenant = p_tenant AND user_id = p_user AND answer_id = p_answer_id;
    IF FOUND THEN
        RETURN;
    END IF;
    IF p_replaces IS NOT NULL THEN
        SELECT coalesce(parent, ordinal - 1) INTO followed FROM turns
        WHERE tenant = p_tenant AND user_id = p_user AND answer_id = p_replaces AND session_id = p_session;
        IF NOT FOUND THEN
            RETURN;
        END IF;
    ELSE
        SELECT coalesce(head, turns) INTO followed FROM sessions WHERE tenant = p_tenant AND user_id = p_user AND session_id = p_session;
    END IF;
    INSERT INTO sessions (tenant, user_id, session_id, title, created_at, updated_at, turns)
    VALUES (p_tenant, p_user, p_session, p_title, p_created_at, p_created_at, 1)
    ON CONFLICT (tenant, user_id, session_id) DO UPDATE
    SET turns = sessions.turns + 1, head = sessions.turns + 1, updated_at = greatest(sessions.updated_at, excluded.updated_at)
    RETURNING turns, p_session INTO place, kept_in;
    INSERT INTO turns (tenant, user_id, session_id, ordinal, answer_id, question, answer, citations, complete, created_at, parent)
    VALUES (p_tenant, p_user, p_session, place, p_answer_id, p_question, p_answer, p_citations, p_complete, p_created_at, coalesce(followed, 0));
    SELECT count(*) INTO unsummarised FROM way_back(p_tenant, p_user, p_session, place, 100) AS way(ordinal) WHERE way.ordinal > coalesce((
        SELECT max(s.through) FROM summaries s WHERE s.tenant = p_tenant AND s.user_id = p_user AND s.session_id = p_session
          AND s.through IN (SELECT way_back(p_tenant, p_user, p_session, place, 100))
    ), 0);
END
$$;

-- As before, but it is noted. FOR UPDATE waits for records of the user that are being written: their operations are seen below, and those
-- that come afterwards see the note.
CREATE OR REPLACE FUNCTION delete_session(p_tenant text, p_user text, p_session text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM users WHERE tenant = p_tenant AND user_id = p_user FOR UPDATE;
    DELETE FROM turns WHERE tenant = p_tenant AND user_id = p_user AND session_id = p_session;
    DELETE FROM sessions WHERE tenant = p_tenant AND user_id = p_user AND session_id = p_session;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM note_deletion(p_tenant, p_user, p_session);
    UPDATE operations SET session_id = '' WHERE tenant = p_tenant AND session_id = p_session AND user_id = p_user;
    RETURN true;
END
$$;

-- As before, but it is noted.
CREATE OR REPLACE FUNCTION erase_user(p_tenant text, p_user text) RETURNS text LANGUAGE plpgsql AS $$
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
    PERFORM note_deletion(p_tenant, p_user, '');
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

-- As before, but an operation of a conversation that was deleted after it was asked is booked without its id.
CREATE OR REPLACE FUNCTION book_operations(p_operations json, p_attempts json, p_steps json, p_moves jsonb) RETURNS uuid[] LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    told operations[] := (SELECT array_agg(o) FROM json_populate_recordset(NULL::operations, p_operations) o);
    new_ones uuid[];
BEGIN
    PERFORM ensure_user(mine.tenant, mine.user_id)
    FROM (SELECT DISTINCT o.tenant, o.user_id FROM unnest(told) o ORDER BY 1, 2) mine
    WHERE NOT EXISTS (SELECT FROM users u WHERE u.tenant = mine.tenant AND u.user_id = mine.user_id);
    -- The lock that writing an operation takes anyway, before what it is to keep out is looked for.
    PERFORM 1 FROM users u
    WHERE (u.tenant, u.user_id) IN (SELECT o.tenant, o.user_id FROM unnest(told) o WHERE o.session_id <> '')
    ORDER BY u.tenant, u.user_id FOR KEY SHARE;
    IF EXISTS (SELECT FROM unnest(told) o WHERE o.session_id <> '' AND deleted_since(o.tenant, o.user_id, o.session_id, o.created_at)) THEN
        told := (
            SELECT array_agg(json_populate_record(o, CASE WHEN deleted_since(o.tenant, o.user_id, o.session_id, o.created_at)
                                                     THEN '{"session_id": ""}' ELSE '{}' END::json))
            FROM unnest(told) o
        );
    END IF;
    IF jsonb_array_length(p_moves) > 0 THEN -- before anything else is locked: counters come first in every transaction
        PERFORM resolve_holds(p_moves, clock_timestamp());
    END IF;

    WITH named AS (
        INSERT INTO operation_ids AS k SELECT o.tenant, o.operation_id, o.created_at FROM unnest(told) o
        ON CONFLICT DO NOTHING RETURNING k.operation_id
    )
    SELECT coalesce(array_agg(n.operation_id), '{}') INTO new_ones FROM named n;
    WITH written AS (
        INSERT INTO operations AS o SELECT t.* FROM unnest(told) t WHERE t.operation_id = ANY (new_ones)
        RETURNING o.tenant, o.user_id, o.operation_id
    )
    SELECT coalesce(array_agg(w.operation_id), '{}') INTO new_ones
    FROM written w, pg_notify('tailrace_operations', json_build_array(w.tenant, w.user_id, w.operation_id)::text);
    INSERT INTO attempts SELECT * FROM json_populate_recordset(NULL::attempts, p_attempts) a WHERE a.operation_id = ANY (new_ones);
    INSERT INTO steps SELECT * FROM json_populate_recordset(NULL::steps, p_steps) s WHERE s.operation_id = ANY (new_ones);
    RETURN new_ones;
END
$$;
