# SPDX-License-Identifier: Apache-2.0
"""The messages of the SPIFFE Workload API that this library speaks (SPIFFE, workloadapi/workload.proto).

That file has no package: `X509SVIDRequest` and its siblings are names at the root of protobuf's default pool, where
every program that speaks SPIFFE registers its own copy, and a second copy is an error. So ours are built here in a
pool of their own, and any SPIFFE library can be imported beside them. Only the wire is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

SERVICE: Final = "SpiffeWorkloadAPI"

_FIELD = descriptor_pb2.FieldDescriptorProto
_STRING, _BYTES, _MESSAGE = _FIELD.TYPE_STRING, _FIELD.TYPE_BYTES, _FIELD.TYPE_MESSAGE
_ONE, _MANY = _FIELD.LABEL_OPTIONAL, _FIELD.LABEL_REPEATED


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="cloister/guest/spiffe_messages.proto", syntax="proto3")
    file.message_type.add(name="X509SVIDRequest")
    response = file.message_type.add(name="X509SVIDResponse")
    response.field.add(name="svids", number=1, type=_MESSAGE, label=_MANY, type_name=".X509SVID")
    response.field.add(name="crl", number=2, type=_BYTES, label=_MANY)
    _add_map(response, "federated_bundles", "FederatedBundlesEntry", 3)
    svid = file.message_type.add(name="X509SVID")
    svid.field.add(name="spiffe_id", number=1, type=_STRING, label=_ONE)
    svid.field.add(name="x509_svid", number=2, type=_BYTES, label=_ONE)
    svid.field.add(name="x509_svid_key", number=3, type=_BYTES, label=_ONE)
    svid.field.add(name="bundle", number=4, type=_BYTES, label=_ONE)
    svid.field.add(name="hint", number=5, type=_STRING, label=_ONE)
    file.message_type.add(name="X509BundlesRequest")
    bundles = file.message_type.add(name="X509BundlesResponse")
    bundles.field.add(name="crl", number=1, type=_BYTES, label=_MANY)
    _add_map(bundles, "bundles", "BundlesEntry", 2)
    return file


def _add_map(message: descriptor_pb2.DescriptorProto, name: str, entry_name: str, number: int) -> None:
    """Add a map<string, bytes>, which on the wire is a repeated message of key and value."""
    entry = message.nested_type.add(name=entry_name)
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_STRING, label=_ONE)
    entry.field.add(name="value", number=2, type=_BYTES, label=_ONE)
    kind = f".{message.name}.{entry_name}"
    message.field.add(name=name, number=number, type=_MESSAGE, label=_MANY, type_name=kind)


_POOL: Final = descriptor_pool.DescriptorPool()
_POOL.Add(_file())


def _message(name: str) -> type[Message]:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(name))


X509SVIDRequest: Final = _message("X509SVIDRequest")
X509SVIDResponse: Final = _message("X509SVIDResponse")
X509BundlesRequest: Final = _message("X509BundlesRequest")
X509BundlesResponse: Final = _message("X509BundlesResponse")


def x509_svid_response(*, spiffe_id: str, chain_der: bytes, key_pkcs8_der: bytes, bundle_der: bytes) -> bytes:
    """Return a response with one SVID; the DER fields are concatenations, leaf first."""
    svid = {"spiffe_id": spiffe_id, "x509_svid": chain_der, "x509_svid_key": key_pkcs8_der, "bundle": bundle_der}
    return X509SVIDResponse(svids=[svid]).SerializeToString()


def x509_bundles_response(bundles: Mapping[str, bytes]) -> bytes:
    """Return a response with the CA certificates (concatenated DER) of each trust domain ("spiffe://...")."""
    return X509BundlesResponse(bundles=dict(bundles)).SerializeToString()
