"""A request's tenant between front end and leader."""

from cluster.rpc.generated.remuda.v1 import replica_pb2
from engine.request import NO_TENANT, Tenant


def tenant_to_proto(tenant: Tenant) -> replica_pb2.Tenant | None:
    """None: it need not travel."""
    if tenant == NO_TENANT:
        return None
    return replica_pb2.Tenant(name=tenant.name, weight=tenant.weight, priority=tenant.priority)


def tenant_from_proto(message: replica_pb2.Submit) -> Tenant:
    """Front ends of earlier versions name none. The engine checks the values."""
    if not message.HasField("tenant"):
        return NO_TENANT
    return Tenant(message.tenant.name, message.tenant.weight, message.tenant.priority)
