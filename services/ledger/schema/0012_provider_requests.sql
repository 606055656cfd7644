-- A provider's export names its requests; they are looked up by the thousand.
CREATE INDEX attempts_of_provider_request ON attempts (provider_request_id) WHERE provider_request_id <> '';
