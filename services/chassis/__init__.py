"""What all four services share: settings, errors, server, channel, deadline, telemetry, lifecycle.

No service's name and no word of its domain may appear here."""

import os

# Channels on gRPC's older poller: its event engine hands every message through two more threads, which cost the gateway a third of its CPU
# per streamed token (`make bench`). Read when gRPC starts, so it stands where every user of gRPC passes first; a value of yours wins.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client")
