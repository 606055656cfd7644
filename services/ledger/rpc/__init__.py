"""The contract's side of the ledger: every RPC validates, calls and translates. No SQL, no arithmetic; only here are messages known."""

from services.chassis.clock import Clock
from services.ledger.ports import (
    Budgets,
    Conversations,
    CreditLines,
    HoldBook,
    Keys,
    OperationBook,
    OperationFeed,
    People,
    Prices,
    Privacy,
    UsageReports,
)
from services.ledger.rpc.conversations import ConversationRpcs
from services.ledger.rpc.credit import CreditRpcs
from services.ledger.rpc.money import MoneyRpcs
from services.ledger.rpc.people import PeopleRpcs
from services.ledger.rpc.privacy import PrivacyRpcs
from services.ledger.rpc.records import RecordRpcs
from tailrace.ledger.v1 import ledger_service_pb2, ledger_service_pb2_grpc

SERVICE_NAME = ledger_service_pb2.DESCRIPTOR.services_by_name["LedgerService"].full_name
register = ledger_service_pb2_grpc.add_LedgerServiceServicer_to_server


class LedgerServicer(MoneyRpcs, CreditRpcs, RecordRpcs, PeopleRpcs, ConversationRpcs, PrivacyRpcs):
    """LedgerService, one file a family of RPCs."""

    def __init__(
        self,
        *,
        holds: HoldBook,
        credit: CreditLines,
        lease_life_ms: int,
        operations: OperationBook,
        usage: UsageReports,
        feed: OperationFeed,
        people: People,
        privacy: Privacy,
        budgets: Budgets,
        keys: Keys,
        conversations: Conversations,
        prices: Prices,
        clock: Clock,
    ) -> None:
        self._holds, self._operations, self._usage, self._feed = holds, operations, usage, feed
        self._credit, self._lease_life_ms = credit, lease_life_ms
        self._privacy = privacy
        self._people, self._budgets, self._keys, self._conversations = people, budgets, keys, conversations
        self._prices, self._clock, self._reading = prices, clock, set()
