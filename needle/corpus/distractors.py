"""Which other tools stand beside the right ones: from the same domain (hard) or another (easy), none that could serve
too."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse

from needle.schema import Example, Tool

# Cosine of TF-IDF word vectors above which a tool of another domain may serve the same request.
TOO_SIMILAR = 0.30
TOO_SIMILAR_WHEN_REMOVED = 0.20


class ToolPool:
    """The tools that may be shown, with their mutual similarities."""

    def __init__(self, tools: Mapping[str, Sequence[Tool]]):
        self.tools = [tool for domain in tools.values() for tool in domain]
        self.domains = [name for name, domain in tools.items() for _ in domain]
        self.index = {
            (domain, tool.name): i for i, (domain, tool) in enumerate(zip(self.domains, self.tools, strict=True))
        }
        self.of_domain = {
            name: np.array([i for i, other in enumerate(self.domains) if other == name]) for name in tools
        }
        self.similarity = _similarities([_words(tool) for tool in self.tools])

    def candidates(self, example: Example, gold: Sequence[int], *, limit: float) -> tuple[np.ndarray, np.ndarray]:
        """Indices of same-domain and other-domain tools that cannot serve the request."""
        home = self.of_domain[example.domain]
        if not example.calls and not gold:  # unserved by its own domain; another domain's tool might serve it
            return home, np.zeros(0, dtype=int)
        like = self.similarity[list(gold)].max(axis=0)
        hard = home[~np.isin(home, gold)]
        names = {self.tools[i].name for i in home}
        easy = np.flatnonzero(like <= limit)
        return hard, easy[[self.domains[i] != example.domain and self.tools[i].name not in names for i in easy]]


def show_tools(
    example: Example,
    *,
    rng: np.random.Generator,
    pool: ToolPool,
    count: int,
    hard_frac: float,
    remove_gold: bool,
) -> Example:
    """The example with `count` tools (more if more are called) in random order; without the called ones if so asked."""
    gold = [pool.index[example.domain, tool.name] for tool in example.tools]
    limit = TOO_SIMILAR_WHEN_REMOVED if remove_gold else TOO_SIMILAR
    hard, easy = pool.candidates(example, gold, limit=limit)
    if remove_gold:
        hard = hard[pool.similarity[gold][:, hard].max(axis=0) <= limit]
    shown = [] if remove_gold else list(gold)
    names = {pool.tools[i].name for i in shown}
    wanted = max(count, len(shown))
    draws_hard = rng.random(wanted) < hard_frac
    hard, easy = list(rng.permutation(hard)), list(rng.choice(easy, min(len(easy), 2 * wanted), replace=False))
    for is_hard in draws_hard:
        if len(shown) >= wanted:
            break
        first, second = (hard, easy) if is_hard else (easy, hard)
        source = first or second
        while source:
            i = int(source.pop())
            if pool.tools[i].name not in names:
                names.add(pool.tools[i].name)
                shown.append(i)
                break
    return example.replace(tools=tuple(pool.tools[shown[j]] for j in rng.permutation(len(shown))))


def _words(tool: Tool) -> list[str]:
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", f"{tool.name} {tool.description}")
    return [word.removesuffix("s") for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 2]


def _similarities(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Cosine similarities of TF-IDF vectors, [tools, tools]."""
    vocabulary = {word: i for i, word in enumerate(sorted({w for text in texts for w in text}))}
    rows = [i for i, text in enumerate(texts) for _ in set(text)]
    columns = [vocabulary[word] for text in texts for word in sorted(set(text))]
    counts = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(texts), len(vocabulary)))
    frequency = np.asarray(counts.sum(axis=0)).ravel()
    weighted = counts.multiply(np.log(len(texts) / frequency)).tocsr()
    norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    normed = sparse.diags(1 / np.maximum(norms, 1e-9)) @ weighted
    return np.asarray((normed @ normed.T).todense())
