-- What an API key was narrowed to, within its roles. Empty = everything its roles may do, which is what every older key may.

ALTER TABLE api_keys
    ADD COLUMN scopes text[] NOT NULL DEFAULT '{}'
        CHECK (scopes <@ ARRAY['answers', 'search', 'documents:read', 'documents:write', 'records', 'admin']);
