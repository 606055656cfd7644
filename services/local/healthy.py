"""`python -m services.local.healthy host:port`: exit code 0 if the gRPC server there is serving. For health checks of containers.

It reads the settings that the service itself has, because with mutual TLS nobody else may ask.
"""

import asyncio
import sys

from services.chassis.config import ServiceSettings
from services.local.processes import grpc_health

if __name__ == "__main__":
    sys.exit(0 if asyncio.run(grpc_health(sys.argv[1], ServiceSettings.load().mutual_tls())()) else 1)
