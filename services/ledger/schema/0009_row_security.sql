-- The second lock between tenants, behind the tenant filter of every query: work for a tenant is done as a role that sees this tenant's rows
-- only, whatever the query says. What goes across tenants is done as the owner of the tables, whom row security does not bind: preparing
-- the schema, the sweeper, the feed's catching up, the price book, the auditor; and telling whose an API key is, by find_key.

DO $$
BEGIN
    IF to_regrole('tailrace_tenant') IS NULL THEN
        CREATE ROLE tailrace_tenant NOLOGIN NOBYPASSRLS;
    END IF;
    IF NOT pg_has_role(current_user, 'tailrace_tenant', 'MEMBER') THEN
        GRANT tailrace_tenant TO CURRENT_USER;
    END IF;
EXCEPTION
    WHEN duplicate_object OR unique_violation THEN
        NULL; -- roles belong to the server: another database was prepared at the same moment
    WHEN insufficient_privilege THEN
        RAISE WARNING 'row security is off: the ledger''s user may not create the role tailrace_tenant';
END
$$;

-- Do what follows for one tenant: until the end of the transaction, or until told otherwise. Without the role only the filters bind.
CREATE FUNCTION enter_tenant(p_tenant text, p_local boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('tailrace.tenant', p_tenant, p_local);
    IF to_regrole('tailrace_tenant') IS NOT NULL AND pg_has_role(session_user, 'tailrace_tenant', 'MEMBER') THEN
        PERFORM set_config('role', 'tailrace_tenant', p_local);
    END IF;
END
$$;

-- The chain is written by its trigger alone, in the owner's name: who works for a tenant can read it, and not touch it.
ALTER FUNCTION seal_entries() SECURITY DEFINER SET search_path FROM CURRENT;

-- Resolving is done in the owner's name too, which halves what it costs: the caller has found and locked the holds behind the lock, and
-- the function looks again whose they are.
ALTER FUNCTION resolve_holds(jsonb, timestamptz) SECURITY DEFINER SET search_path FROM CURRENT;

-- Do what follows as the owner again.
CREATE FUNCTION leave_tenant() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('role', 'none', false), set_config('tailrace.tenant', '', false);
END
$$;

-- Lock every table that has a tenant, and every view, that is not locked yet. Runs after the migrations, so that none can forget it.
-- Plans and prices of the tenant '' are common: seen by all, changed by none. Partitions are reached through their table, so they are not granted.
CREATE FUNCTION secure_tenants() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    relation record;
BEGIN
    FOR relation IN
        SELECT format('%I', c.relname) AS name, c.relkind = 'v' AS is_view, c.relrowsecurity AS locked,
               coalesce('security_invoker=true' = ANY (c.reloptions), false) AS sees_as_asker
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'tenant' AND NOT a.attisdropped
        WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p', 'v') AND NOT c.relispartition
    LOOP
        IF relation.is_view AND NOT relation.sees_as_asker THEN
            EXECUTE format('ALTER VIEW %s SET (security_invoker = true)', relation.name);
        ELSIF NOT relation.is_view AND NOT relation.locked THEN
            -- IS NOT DISTINCT FROM is `=` that no index is searched by: the query's own filter chooses the way to the rows, never the lock.
            EXECUTE format('CREATE POLICY own_rows ON %s'
                           ' USING (tenant IS NOT DISTINCT FROM (SELECT current_setting(''tailrace.tenant'', true)))', relation.name);
            IF relation.name IN ('plans', 'prices') THEN
                EXECUTE format('CREATE POLICY common_rows ON %s FOR SELECT USING (tenant = '''')', relation.name);
            END IF;
            EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', relation.name);
        END IF;
        IF to_regrole('tailrace_tenant') IS NOT NULL THEN
            EXECUTE format('GRANT %s ON %s TO tailrace_tenant', CASE WHEN relation.name IN ('chain_heads', 'chain_links') THEN 'SELECT'
                           ELSE 'SELECT, INSERT, UPDATE, DELETE' END, relation.name);
        END IF;
    END LOOP;
    IF to_regrole('tailrace_tenant') IS NOT NULL THEN
        EXECUTE format('GRANT USAGE ON ALL SEQUENCES IN SCHEMA %I TO tailrace_tenant', current_schema());
    END IF;
END
$$;

-- The key of this id, of whichever tenant: who shows a key has not said yet who they are.
CREATE FUNCTION find_key(p_key_id text) RETURNS SETOF api_keys LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT AS $$
    SELECT * FROM api_keys WHERE key_id = p_key_id
$$;

-- The latest turns of a conversation, newest first. A function, because the first token waits for it: it enters its tenant by itself.
CREATE FUNCTION latest_turns(p_tenant text, p_user text, p_session text, p_limit bigint) RETURNS SETOF turns LANGUAGE plpgsql AS $$
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    RETURN QUERY SELECT * FROM turns WHERE tenant = p_tenant AND user_id = p_user AND session_id = p_session ORDER BY ordinal DESC LIMIT p_limit;
END
$$;
