"""Sessions of the offline API: named sequences that can be continued, forked and rolled back."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from thalweg.core import SamplingParams
from thalweg.engine.session_file import FILE_FORMAT, SessionFile, read_session_file
from thalweg.engine.sessions import Point, SavedSession, SessionLimits, Sessions, longest_answer
from thalweg.errors import InvalidRequest, SessionConflict
from thalweg.text.prompts import Prompt, encode_prompt
from thalweg.text.results import RequestOutput

if TYPE_CHECKING:
    from thalweg.engine.llm import LLM


class Session:
    """A saved sequence of an LLM, as LLM.session and LLM.fork give it."""

    def __init__(self, owner: LLMSessions, saved: SavedSession) -> None:
        self._owner, self._saved = owner, saved

    @property
    def name(self) -> str:
        return self._saved.name

    @property
    def token_ids(self) -> list[int]:
        return self._saved.ids

    @property
    def points(self) -> list[int]:
        """The number of tokens at each saved point; the last point is the session's end."""
        return [point.tokens for point in self._saved.points]

    def generate(
        self, prompt: Prompt = (), sampling_params: SamplingParams | None = None, *, save: bool = True
    ) -> RequestOutput:
        """Continue the session's tokens and `prompt` (a text, token ids or nothing). With `save`, prompt and answer
        become a new point; without, the session stays as it is. Raises InvalidRequest, SessionNotFound."""
        return self._owner.generate(self._saved, prompt, sampling_params, save)

    def roll_back(self, point: int) -> None:
        """Make a saved point the session's end, by its index in `points`. Raises InvalidRequest, SessionNotFound."""
        self._owner.roll_back(self._saved, point)

    def write(self, path: str | Path) -> None:
        """Write the session's tokens and points to a file for LLM.load_session. Only the user may read it. An existing
        file is replaced once the new one is complete. What was computed stays in the engine, or in its cache folder.
        Raises OSError."""
        identity = self._owner.identity
        with self._owner.registry.lock:
            saved = SessionFile(FILE_FORMAT, identity, self._saved.salt, self.points, self.token_ids)
        handle, name = tempfile.mkstemp(dir=Path(path).parent, prefix=f"{Path(path).name}.")
        try:
            with open(handle, "wb") as file:
                file.write(msgspec.json.encode(saved))
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def delete(self) -> None:
        """Forget the session. What is cached of it then makes room like everything else."""
        self._owner.registry.delete(self._saved)


class LLMSessions:
    """The sessions of one LLM."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.registry = Sessions(SessionLimits(count=100_000, seconds=1e9), lambda key: llm.engine.pump.release(key))
        self.registry.most_points = llm.info.most_session_points

    def add(self, name: str, prompt: Prompt, salt: str) -> Session:
        llm = self._llm
        ids = encode_prompt(prompt, llm.tokenizer, llm.info.vocab_size)
        self.registry.check_new([name], len(ids), 1)
        self._compute(ids, salt)
        saved = self.registry.add(name, ids, salt=salt)
        self._keep(saved, saved.points[0])
        return Session(self, saved)

    @property
    def identity(self) -> str:
        return self._llm.info.identity

    def load(self, path: Path, name: str) -> Session:
        found = read_session_file(path, self.identity, self._llm.info.vocab_size)
        session = self.add(name, found.token_ids[: found.points[0]], found.salt)
        saved = session._saved
        try:
            for start, end in pairwise(found.points):
                point = self.registry.extend(saved, saved.version, found.token_ids[start:end])
                self._compute(found.token_ids[:end], saved.salt)
                self._keep(saved, point)
        except BaseException:
            self.registry.delete(saved)  # half a session keeps no name
            raise
        return session

    def get(self, name: str, salt: str) -> Session:
        return Session(self, self.registry.get(name, salt=salt))

    def fork(self, session: Session | str, names: Sequence[str] | int, salt: str) -> list[Session]:
        name = session if isinstance(session, str) else session.name
        with self.registry.lock:
            saved = self.registry.get(name, salt=salt if isinstance(session, str) else session._saved.salt)
            if isinstance(names, int):
                taken = {each.name for each in self.registry.all(salt=saved.salt)}
                free = (f"{name}/{i}" for i in range(1, len(taken) + names + 2))
                names = [each for each in free if each not in taken][:names]
            return [Session(self, each) for each in self.registry.fork(saved, list(names))]

    def generate(self, saved: SavedSession, prompt: Prompt, params: SamplingParams | None, save: bool) -> RequestOutput:
        llm = self._llm
        new = encode_prompt(prompt, llm.tokenizer, llm.info.vocab_size) if len(prompt) else []
        params = replace(params or llm.get_default_sampling_params(), cache_salt=saved.salt)
        with self.registry.lock:
            self._check(saved)
            version, ids = saved.version, saved.ids + new
        if not save:
            return llm.generate([ids], params)[0]
        most = len(new) + longest_answer(params.max_tokens, len(ids), llm.info.max_model_len)
        with self.registry.extending(saved, version, most) as extension:
            output = llm.generate([ids], params)[0]
            if output.error is None:
                point = self.registry.extend(saved, version, new + output.outputs[0].token_ids, extension)
                self._keep(saved, point)
        return output

    def roll_back(self, saved: SavedSession, point: int) -> None:
        with self.registry.lock:
            self._check(saved)
            self.registry.roll_back(saved, point)

    def _compute(self, ids: list[int], salt: str) -> None:
        output = self._llm.generate([ids], SamplingParams(max_tokens=0, cache_salt=salt))[0]
        if output.error is not None:
            raise InvalidRequest(f"the prompt could not be computed: {output.error}")

    def _check(self, saved: SavedSession) -> None:
        if self.registry.get(saved.name, saved.owner, saved.salt) is not saved:
            raise SessionConflict(f"session {saved.name!r} was deleted, and another has its name; get that one")

    def _keep(self, saved: SavedSession, point: Point) -> None:
        pump = self._llm.engine.pump
        point.cached = pump.keep(point.key, saved.salt, saved.ids[: point.tokens])
        if point.shares < 1:  # another thread deleted it meanwhile
            pump.release(point.key)


class WithSessions:
    """What an LLM offers of sessions."""

    _sessions: LLMSessions

    def session(self, name: str, prompt: Prompt | None = None, *, cache_salt: str = "") -> Session:
        """A session by its name. With `prompt` (a text or token ids), a new session, whose prompt is computed; without,
        the existing one. Raises InvalidRequest, SessionConflict if the name is in use, SessionNotFound."""
        if prompt is None:
            return self._sessions.get(name, cache_salt)
        return self._sessions.add(name, prompt, cache_salt)

    def load_session(self, path: str | Path, name: str) -> Session:
        """A session from the file that Session.write wrote, under `name`. What is not cached of it is computed. Raises
        InvalidRequest if the file is damaged or of another model or version, SessionConflict."""
        return self._sessions.load(Path(path), name)

    def fork(self, session: Session | str, names: Sequence[str] | int, *, cache_salt: str = "") -> list[Session]:
        """New sessions that are equal to `session`. `names` is their names, or a number of them: NAME/1, NAME/2, ...
        Nothing of the session is computed again. Raises as `session`."""
        return self._sessions.fork(session, names, cache_salt)
