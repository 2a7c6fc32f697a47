"""`Progress`: what has come of a request, so that the rest can be asked for when its stream breaks. No I/O."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, field, replace

from pregate.base.completion import Chunk, Completion, TokenLogprob
from pregate.client.proto import pregate_pb2 as pb
from pregate.client.proto.plain import read_chunk, read_completion


@dataclass
class _Text:
    """One completion so far, and how much of it comes again."""

    token_ids: list[int] = field(default_factory=list)
    num_characters: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    ids_to_skip: int = 0
    characters_to_skip: int = 0
    ended: bool = False

    def take(self, chunk: Chunk) -> Chunk | None:
        """The chunk without what came before; None where that is all of it."""
        ids, text = chunk.token_ids[self.ids_to_skip :], chunk.text[self.characters_to_skip :]
        logprobs = chunk.logprobs[self.ids_to_skip :]
        self.ids_to_skip -= len(chunk.token_ids) - len(ids)
        self.characters_to_skip -= len(chunk.text) - len(text)
        of_prompt = () if self.prompt_logprobs else chunk.prompt_logprobs
        self.token_ids += ids
        self.num_characters += len(text)
        self.logprobs += logprobs
        self.prompt_logprobs = self.prompt_logprobs or of_prompt
        if self.ended or not (ids or text or of_prompt):
            return None
        return replace(chunk, token_ids=ids, text=text, logprobs=logprobs, prompt_logprobs=of_prompt)


class Progress:
    """A request and what has come of it. `request` is what to send: at first as it was given, later for the rest.

    A single completion goes on after the ids that came. Several, and one of which nothing came, are computed again
    and what came is passed over; so a seed is chosen where draws have none. The id stays, so that a server that has not
    noticed the break lets go of the first one.
    """

    def __init__(self, request: pb.GenerateRequest) -> None:
        self.request = pb.GenerateRequest()
        self.request.CopyFrom(request)
        self.completions: list[Completion] = []
        self._texts: dict[int, _Text] = {}
        sampling = self.request.sampling_params
        if sampling.temperature > 0 and not sampling.HasField("seed"):
            sampling.seed = secrets.randbits(62)
        self.request.request_id = self.request.request_id or uuid.uuid4().hex

    def resume(self) -> None:
        """The stream broke: make of `request` what asks for the rest."""
        self.request.resumes = True
        for text in self._texts.values():
            text.ids_to_skip, text.characters_to_skip = len(text.token_ids), text.num_characters
        if self.request.sampling_params.n <= 1 and 0 in self._texts:
            self.request.generated_ids[:] = self._texts[0].token_ids

    def take(self, response: pb.GenerateResponse) -> Chunk | None:
        """Note what a message brings; returns it where it is a chunk with something new."""
        if response.WhichOneof("response") == "chunk":
            chunk = read_chunk(response.chunk)
            return self._texts.setdefault(chunk.index, _Text()).take(chunk)
        done = read_completion(response.complete)
        text = self._texts.setdefault(done.index, _Text())
        if not text.ended:
            text.ended = True
            if self.request.generated_ids:  # those that came before the break are only here
                done = replace(done, logprobs=tuple(text.logprobs), prompt_logprobs=text.prompt_logprobs)
            self.completions.append(done)
        return None

    @property
    def completion(self) -> Completion | None:
        """The first completion, None while it runs."""
        return next((c for c in self.completions if c.index == 0), None)
