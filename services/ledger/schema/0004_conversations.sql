-- Conversations: the only place where questions and answers are kept.

CREATE TABLE sessions (
    tenant     text NOT NULL,
    user_id    text NOT NULL,
    session_id text NOT NULL CHECK (length(session_id) BETWEEN 1 AND 128),
    title      text NOT NULL CHECK (length(title) <= 120),
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    turns      integer NOT NULL CHECK (turns >= 0),
    PRIMARY KEY (tenant, user_id, session_id),
    FOREIGN KEY (tenant, user_id) REFERENCES users
);
CREATE INDEX sessions_newest ON sessions (tenant, user_id, updated_at DESC, session_id DESC);

CREATE TABLE turns (
    tenant     text NOT NULL,
    user_id    text NOT NULL,
    session_id text NOT NULL,
    ordinal    integer NOT NULL CHECK (ordinal >= 1),
    answer_id  uuid NOT NULL,
    question   text NOT NULL,
    answer     text NOT NULL,
    citations  jsonb NOT NULL,
    complete   boolean NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, user_id, session_id, ordinal),
    UNIQUE (tenant, user_id, answer_id),
    FOREIGN KEY (tenant, user_id, session_id) REFERENCES sessions
);

-- Append a turn and return its position. The same answer again changes nothing and returns where it is kept.
CREATE FUNCTION append_turn(
    p_tenant text, p_user text, p_session text, p_answer_id uuid, p_question text, p_answer text,
    p_citations jsonb, p_complete boolean, p_created_at timestamptz, OUT place integer, OUT kept_in text
) LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM users WHERE tenant = p_tenant AND user_id = p_user) THEN
        PERFORM ensure_user(p_tenant, p_user);
    END IF;
    -- The user's answers are looked at and numbered one after the other; different users do not wait for each other.
    PERFORM 1 FROM users WHERE tenant = p_tenant AND user_id = p_user FOR NO KEY UPDATE;
    SELECT ordinal, session_id INTO place, kept_in FROM turns WHERE tenant = p_tenant AND user_id = p_user AND answer_id = p_answer_id;
    IF FOUND THEN
        RETURN;
    END IF;
    INSERT INTO sessions (tenant, user_id, session_id, title, created_at, updated_at, turns)
    VALUES (p_tenant, p_user, p_session, left(p_question, 120), p_created_at, p_created_at, 1)
    ON CONFLICT (tenant, user_id, session_id) DO UPDATE
    SET turns = sessions.turns + 1, updated_at = greatest(sessions.updated_at, excluded.updated_at)
    RETURNING turns, p_session INTO place, kept_in;
    INSERT INTO turns (tenant, user_id, session_id, ordinal, answer_id, question, answer, citations, complete, created_at)
    VALUES (p_tenant, p_user, p_session, place, p_answer_id, p_question, p_answer, p_citations, p_complete, p_created_at);
END
$$;
