-- A run id alone does not say whose run it is: last_seqs tells the tenant too.
-- depends: 0001_create_state

-- migrate: apply

DROP FUNCTION state.last_seqs(text[], uuid[]);

-- The last seqs of runs that are followed here, to find what was missed. The release before reads what it knows of it.
CREATE FUNCTION state.last_seqs(tenants text[], run_ids uuid[])
RETURNS TABLE (tenant_id text, run_id uuid, last_seq bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
  SELECT r.tenant_id, r.run_id, r.last_seq FROM unnest(tenants, run_ids) AS wanted (tenant_id, run_id)
  JOIN state.runs r ON r.tenant_id = wanted.tenant_id AND r.run_id = wanted.run_id
$body$;

REVOKE ALL ON FUNCTION state.last_seqs(text[], uuid[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION state.last_seqs(text[], uuid[]) TO mainspring_state;
GRANT CREATE ON SCHEMA state TO mainspring_state_engine;
ALTER FUNCTION state.last_seqs(text[], uuid[]) OWNER TO mainspring_state_engine;
REVOKE CREATE ON SCHEMA state FROM mainspring_state_engine;

-- migrate: rollback
-- Forward only: restore a backup instead.
