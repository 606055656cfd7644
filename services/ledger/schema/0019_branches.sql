-- A conversation is a tree: a turn follows another, and one that takes the place of a third follows what that followed. The current branch
-- is the way from the head back to the first turn. Along it positions only grow, since a turn is kept after those it follows.

-- NULL, as in rows that were kept before: a turn follows the one kept before it, and the head is the turn kept last.
ALTER TABLE turns ADD COLUMN parent integer CHECK (parent >= 0 AND parent < ordinal);
ALTER TABLE sessions
    ADD COLUMN head integer CHECK (head >= 1),
    ADD COLUMN title_by text NOT NULL DEFAULT 'rule' CHECK (title_by IN ('rule', 'model', 'user'));

-- What a conversation said from its first turn up to one of its turns, in short. The way there is the same in every branch that has the turn.
CREATE TABLE summaries (
    tenant     text NOT NULL,
    user_id    text NOT NULL,
    session_id text NOT NULL,
    through    integer NOT NULL CHECK (through >= 1),
    summary    text NOT NULL CHECK (length(summary) BETWEEN 1 AND 16000),
    made_by    text NOT NULL CHECK (length(made_by) BETWEEN 1 AND 128),
    created_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, user_id, session_id, through),
    FOREIGN KEY (tenant, user_id, session_id) REFERENCES sessions ON DELETE CASCADE
);

-- What an operation was for, besides an answer: `rewrite`, `summary` or `title`. NULL = an answer.
ALTER TABLE operations ADD COLUMN purpose text CHECK (length(purpose) <= 64);

-- The way back from a turn: positions, nearest first.
CREATE FUNCTION way_back(p_tenant text, p_user text, p_session text, p_from integer, p_limit bigint) RETURNS SETOF integer
LANGUAGE sql STABLE AS $$
    WITH RECURSIVE way AS (
        SELECT t.ordinal, coalesce(t.parent, t.ordinal - 1) AS before, 1 AS length FROM turns t
        WHERE t.tenant = p_tenant AND t.user_id = p_user AND t.session_id = p_session AND t.ordinal = p_from
        UNION ALL
        SELECT t.ordinal, coalesce(t.parent, t.ordinal - 1), way.length + 1 FROM way JOIN turns t ON t.ordinal = way.before
        WHERE t.tenant = p_tenant AND t.user_id = p_user AND t.session_id = p_session AND way.length < p_limit
    )
    SELECT ordinal FROM way
$$;

-- The latest turns of the current branch, newest first.
CREATE OR REPLACE FUNCTION latest_turns(p_tenant text, p_user text, p_session text, p_limit bigint) RETURNS SETOF turns LANGUAGE plpgsql AS $$
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    RETURN QUERY SELECT t.* FROM turns t
    WHERE t.tenant = p_tenant AND t.user_id = p_user AND t.session_id = p_session AND t.ordinal IN (
        SELECT way_back(p_tenant, p_user, p_session, coalesce(s.head, s.turns), p_limit) FROM sessions s
        WHERE s.tenant = p_tenant AND s.user_id = p_user AND s.session_id = p_session
    )
    ORDER BY t.ordinal DESC;
END
$$;

-- The turns that led to an answer, and its own, newest first; none if the conversation does not have it.
CREATE FUNCTION turns_until(p_tenant text, p_user text, p_session text, p_answer_id uuid, p_limit bigint) RETURNS SETOF turns
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    RETURN QUERY SELECT t.* FROM turns t
    WHERE t.tenant = p_tenant AND t.user_id = p_user AND t.session_id = p_session AND t.ordinal IN (
        SELECT way_back(p_tenant, p_user, p_session, u.ordinal, p_limit) FROM turns u
        WHERE u.tenant = p_tenant AND u.user_id = p_user AND u.answer_id = p_answer_id AND u.session_id = p_session
    )
    ORDER BY t.ordinal DESC;
END
$$;

-- What is known in short of a conversation up to one of its turns, or earlier.
CREATE FUNCTION latest_summary(p_tenant text, p_user text, p_session text, p_answer_id uuid, p_limit bigint) RETURNS SETOF summaries
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    RETURN QUERY SELECT s.* FROM summaries s
    WHERE s.tenant = p_tenant AND s.user_id = p_user AND s.session_id = p_session
      AND s.through IN (
          SELECT way_back(p_tenant, p_user, p_session, u.ordinal, p_limit) FROM turns u
          WHERE u.tenant = p_tenant AND u.user_id = p_user AND u.answer_id = p_answer_id AND u.session_id = p_session
      )
    ORDER BY s.through DESC LIMIT 1;
END
$$;

-- Append a turn to the current branch, or in the place of another (`p_replaces`); the conversation goes on from it. Returns its position and
-- how many turns up to it no summary covers, counted up to 100; no position if there is nothing to replace. The same answer again changes
-- nothing and returns where it is kept.
CREATE FUNCTION append_turn(
    p_tenant text, p_user text, p_session text, p_answer_id uuid, p_question text, p_answer text, p_citations jsonb, p_complete boolean,
    p_created_at timestamptz, p_title text, p_replaces uuid, OUT place integer, OUT kept_in text, OUT unsummarised integer
) LANGUAGE plpgsql AS $$
DECLARE
    followed integer;
BEGIN
    IF NOT EXISTS (SELECT FROM users WHERE tenant = p_tenant AND user_id = p_user) THEN
        PERFORM ensure_user(p_tenant, p_user);
    END IF;
    -- The user's answers are looked at and numbered one after the other; different users do not wait for each other.
    PERFORM 1 FROM users WHERE tenant = p_tenant AND user_id = p_user FOR NO KEY UPDATE;
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

-- As the version before this one calls it, during an upgrade.
CREATE OR REPLACE FUNCTION append_turn(
    p_tenant text, p_user text, p_session text, p_answer_id uuid, p_question text, p_answer text,
    p_citations jsonb, p_complete boolean, p_created_at timestamptz, OUT place integer, OUT kept_in text
) LANGUAGE sql AS $$
    SELECT a.place, a.kept_in FROM append_turn(p_tenant, p_user, p_session, p_answer_id, p_question, p_answer, p_citations, p_complete,
                                               p_created_at, left(p_question, 120), NULL) a
$$;

-- Keep a summary up to the turn of an answer. Of a conversation the 16 that reach furthest stay. Returns false if there is no such turn.
CREATE FUNCTION put_summary(
    p_tenant text, p_user text, p_session text, p_answer_id uuid, p_summary text, p_made_by text, p_created_at timestamptz
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    reached integer;
BEGIN
    SELECT ordinal INTO reached FROM turns
    WHERE tenant = p_tenant AND user_id = p_user AND answer_id = p_answer_id AND session_id = p_session;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO summaries (tenant, user_id, session_id, through, summary, made_by, created_at)
    VALUES (p_tenant, p_user, p_session, reached, p_summary, p_made_by, p_created_at)
    ON CONFLICT (tenant, user_id, session_id, through) DO UPDATE
    SET summary = excluded.summary, made_by = excluded.made_by, created_at = excluded.created_at;
    DELETE FROM summaries s WHERE s.tenant = p_tenant AND s.user_id = p_user AND s.session_id = p_session AND s.through NOT IN (
        SELECT k.through FROM summaries k WHERE k.tenant = p_tenant AND k.user_id = p_user AND k.session_id = p_session
        ORDER BY k.through DESC LIMIT 16
    );
    RETURN true;
END
$$;

-- Forget a conversation: what was asked and answered goes, and its id from the operations, which stay for the money. Returns whether
-- there was one.
CREATE FUNCTION delete_session(p_tenant text, p_user text, p_session text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM users WHERE tenant = p_tenant AND user_id = p_user FOR NO KEY UPDATE;
    DELETE FROM turns WHERE tenant = p_tenant AND user_id = p_user AND session_id = p_session;
    DELETE FROM sessions WHERE tenant = p_tenant AND user_id = p_user AND session_id = p_session;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE operations SET session_id = '' WHERE tenant = p_tenant AND session_id = p_session AND user_id = p_user;
    RETURN true;
END
$$;
