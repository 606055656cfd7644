"""What all four services share: settings, errors, server, channel, deadline, telemetry, lifecycle.

No service's name and no word of its domain may appear here."""
