-- As 0023, for conversations: an answer is found by its own id, and a turn by its place. Both keys began with the user; while PostgreSQL knew
-- no better it took the wrong one, and read all turns of the user for each step back through a conversation.
ALTER TABLE turns DROP CONSTRAINT turns_tenant_user_id_answer_id_key;
ALTER TABLE turns ADD UNIQUE (answer_id, tenant, user_id);

DO $$
DECLARE
    called regprocedure;
BEGIN
    FOR called IN
        SELECT oid FROM pg_proc WHERE pronamespace = current_schema()::regnamespace
        AND proname IN ('append_turn', 'way_back', 'latest_turns', 'turns_until', 'latest_summary', 'put_summary')
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off', called);
    END LOOP;
END
$$;
