# SPDX-License-Identifier: Apache-2.0
"""The secret manager: named texts with versions, under a key of their owner's or the server's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import apsw

from cloister_sim.ehsm import core
from cloister_sim.ehsm.vault import DAY_MS, Vault
from cloister_sim.ehsm.wire import Answer, Call, Refused, bad_request

_SUCCESSFUL: Final = "successful"
_ROTATION: Final = re.compile(r"(\d{1,4})([dhms])", re.ASCII)
_UNIT_MS: Final = {"d": DAY_MS, "h": 3_600_000, "m": 60_000, "s": 1000}
_ROTATION_LIMITS_MS: Final = (6 * 3_600_000, 8760 * 3_600_000)
_RECOVERY_DAYS: Final = 30
_LIST_LIMIT: Final = 4000


@dataclass(frozen=True, slots=True)
class _Secret:
    appid: str
    name: str
    description: str | None
    created_ms: int
    deleted_ms: int | None
    keyid: str | None
    rotation_ms: int | None


class SecretActions:
    """One method per action: raise Refused."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    async def create(self, call: Call) -> Answer:
        name, keyid = call.fields["secretName"], call.fields.get("encryptionKeyId")
        rotation = _rotation(call.fields.get("rotationInterval"))
        data = await self._seal(call.appid, name, 1, keyid, call.fields["secretData"], call.now_ms)

        def insert(db: apsw.Connection) -> None:
            if _find(db, call.appid, name) is not None:
                raise bad_request("Secret name already exists, cannot use the same secret name")
            row = (call.appid, name, call.fields.get("description"), call.now_ms, None, keyid, rotation)
            db.execute("INSERT INTO secrets VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            db.execute("INSERT INTO secret_versions VALUES (?, ?, 1, ?, ?)", (call.appid, name, call.now_ms, data))

        await self._vault.write(insert)
        return Answer(200, f"The {name} create success.", {})

    async def put_value(self, call: Call) -> Answer:
        name = call.fields["secretName"]
        while True:
            found = await self._vault.read(
                lambda db: (_find(db, call.appid, name), _last_version(db, call.appid, name))
            )
            secret, last = found
            if secret is None:
                raise bad_request("Can not find secretName")
            if secret.deleted_ms is not None:
                raise bad_request("Can not put value for a deleted secret.")
            data = await self._seal(call.appid, name, last + 1, secret.keyid, call.fields["secretData"], call.now_ms)

            def insert(db: apsw.Connection, version: int = last + 1, data: bytes = data) -> bool:
                row = (call.appid, name, version, call.now_ms, data)
                db.execute("INSERT OR IGNORE INTO secret_versions VALUES (?, ?, ?, ?, ?)", row)
                return db.changes() > 0

            if await self._vault.write(insert):  # unless another request took this number
                return Answer(200, f"The {name} new version put success.", {})

    async def get_value(self, call: Call) -> Answer:
        name = call.fields["secretName"]
        secret = await self._vault.read(lambda db: _find(db, call.appid, name))
        if secret is None or secret.deleted_ms is not None:
            raise bad_request(f"Can't find the {name}'s value.")
        version = call.fields.get("versionId")
        rows: list[Any] = await self._vault.read(
            lambda db: db.execute(
                "SELECT version, created_ms, data FROM secret_versions WHERE appid = ? AND name = ? "
                "AND (? IS NULL OR version = ?) ORDER BY version DESC LIMIT 1",
                (call.appid, name, version, version),
            ).fetchall()
        )
        if not rows:
            return Answer(200, _SUCCESSFUL, {})
        number, created_ms, data = rows[0]
        text = await self._open(call.appid, name, number, secret.keyid, data, call.now_ms)
        return Answer(
            200,
            _SUCCESSFUL,
            {"secretName": name, "secretData": text, "versionId": number, "createTime": created_ms},
        )

    async def list_versions(self, call: Call) -> Answer:
        name = call.fields["secretName"]
        rows = await self._vault.read(
            lambda db: db.execute(
                "SELECT version, created_ms FROM secret_versions WHERE appid = ? AND name = ? ORDER BY version",
                (call.appid, name),
            ).fetchall()
        )
        versions = [{"versionId": version, "createTime": created_ms} for version, created_ms in rows]
        result = {"secretName": name, "totalCount": len(versions), "versionIds": versions}
        return Answer(200, "List secret versionIds success.", result)

    async def list(self, call: Call) -> Answer:
        name = call.fields.get("secretName")
        secrets = await self._vault.read(
            lambda db: [
                _secret(row)
                for row in db.execute(
                    "SELECT * FROM secrets WHERE appid = ? AND (? IS NULL OR name = ?) ORDER BY name LIMIT ?",
                    (call.appid, name, name, _LIST_LIMIT),
                )
            ]
        )
        listed = [_describe(secret) for secret in secrets]
        return Answer(200, "List secrets success.", {"totalCount": len(listed), "secretList": listed})

    async def describe(self, call: Call) -> Answer:
        secret = await self._vault.read(lambda db: _find(db, call.appid, call.fields["secretName"]))
        result: dict[str, Any] = {}
        if secret is not None:
            result = _describe(secret)
            if secret.rotation_ms is not None:  # recorded, never performed
                result |= {
                    "rotationInterval": secret.rotation_ms,
                    "lastRotationDate": "",
                    "nextRotationDate": secret.created_ms + secret.rotation_ms,
                }
        return Answer(200, "Describe secrets success.", result)

    async def update_description(self, call: Call) -> Answer:
        name = call.fields["secretName"]

        def update(db: apsw.Connection) -> None:
            secret = _find(db, call.appid, name)
            if secret is None:
                raise bad_request("Cannot find secretName")
            if secret.deleted_ms is not None:
                raise bad_request("Can not modify a deleted secret.")
            row = (call.fields.get("description"), call.appid, name)
            db.execute("UPDATE secrets SET description = ? WHERE appid = ? AND name = ?", row)

        await self._vault.write(update)
        return Answer(200, "Update secret description success.", {})

    async def delete(self, call: Call) -> Answer:
        name, force = call.fields["secretName"], call.fields.get("forceDelete", "false")
        days = call.fields.get("recoveryPeriod", _RECOVERY_DAYS)
        if force.lower() not in ("true", "false"):
            raise bad_request("The forceDelete must be true or false")

        def update(db: apsw.Connection) -> None:
            if _find(db, call.appid, name) is None:
                raise bad_request("Delete error, Can not find the secretName")
            if force == "true":  # "TRUE" only schedules, as at EHSM
                db.execute("DELETE FROM secret_versions WHERE appid = ? AND name = ?", (call.appid, name))
                db.execute("DELETE FROM secrets WHERE appid = ? AND name = ?", (call.appid, name))
            else:
                row = (call.now_ms + days * DAY_MS, call.appid, name)
                db.execute("UPDATE secrets SET deleted_ms = ? WHERE appid = ? AND name = ?", row)

        await self._vault.write(update)
        text = "delete success" if force == "true" else f"will be deleted after {days} days."
        return Answer(200, f"The {name} {text}", {})

    async def restore(self, call: Call) -> Answer:
        name = call.fields["secretName"]

        def update(db: apsw.Connection) -> None:
            if _find(db, call.appid, name) is None:
                raise bad_request("Can not restore secret, the secretName not find.")
            db.execute("UPDATE secrets SET deleted_ms = NULL WHERE appid = ? AND name = ?", (call.appid, name))

        await self._vault.write(update)
        return Answer(200, f"The {name} restore success.", {})

    async def _seal(self, appid: str, name: str, version: int, keyid: str | None, text: str, now_ms: int) -> bytes:
        """Seal a text under the server's key and, when one is named, the owner's key inside of that."""
        data = text.encode(errors="replace")
        if keyid is not None:
            try:
                key = await self._vault.material(appid, keyid, now_ms)
            except Refused:
                raise bad_request("Cannot find cmk by keyid.") from None
            data = core.encrypt(key, data, b"")
        return self._vault.seal(data, "secrets", appid, name, version)

    async def _open(self, appid: str, name: str, version: int, keyid: str | None, data: Any, now_ms: int) -> str:
        opened = self._vault.unseal(data, "secrets", appid, name, version)
        if keyid is not None:
            opened = core.decrypt(await self._vault.material(appid, keyid, now_ms), opened, b"")
        return opened.decode()


def _find(db: apsw.Connection, appid: str, name: str) -> _Secret | None:
    rows = db.execute("SELECT * FROM secrets WHERE appid = ? AND name = ?", (appid, name)).fetchall()
    return _secret(rows[0]) if rows else None


def _secret(row: Any) -> _Secret:
    return _Secret(*row)


def _last_version(db: apsw.Connection, appid: str, name: str) -> int:
    query = "SELECT coalesce(max(version), 0) FROM secret_versions WHERE appid = ? AND name = ?"
    found: Any = db.execute(query, (appid, name)).get
    return int(found)


def _describe(secret: _Secret) -> dict[str, Any]:
    described: dict[str, Any] = {"secretName": secret.name, "createTime": secret.created_ms}
    if secret.description:
        described["description"] = secret.description
    if secret.deleted_ms is not None:
        described["plannedDeleteTime"] = secret.deleted_ms
    return described


def _rotation(text: str | None) -> int | None:
    if text is None:
        return None
    found = _ROTATION.fullmatch(text)
    if found is None:
        raise bad_request("Parameter invalid, The rotationInterval format wrong.")
    interval = int(found[1]) * _UNIT_MS[found[2]]
    least, most = _ROTATION_LIMITS_MS
    if not least <= interval <= most:
        raise bad_request("The rotation time is less than 6 hours or more than 8760 hours")
    return interval
