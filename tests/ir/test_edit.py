"""`Draft` against a model made of plain lists."""

from __future__ import annotations

import sys
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pyrsistent import pmap

from qfunc.ir import Draft, Graph, Node, Ref, fresh_id


def node(id: str, *uses: str) -> Node:
    return Node(id, "f", (("inputs", tuple(Ref(used) for used in uses)),))


def chain(length: int) -> Graph:
    nodes = [node(f"n{i}", *([f"n{i - 1}"] if i else [])) for i in range(length)]
    return Graph(pmap({n.id: n for n in nodes}), tuple(n.id for n in nodes))


class Edits(RuleBasedStateMachine):
    """Every edit is made on a draft and on lists; committing gives what the lists say."""

    @initialize(length=st.integers(1, 6))
    def start(self, length: int) -> None:
        self.graph = chain(length)
        self.order = list(self.graph.order)
        self.uses = {n.id: list(n.uses()) for n in self.graph}
        self._begin()

    def _begin(self) -> None:
        self.before = self.graph
        self.text = repr(self.graph)
        self.draft = Draft(self.graph)
        self.original = set(self.order)
        self.gone: set[str] = set()
        self.beside: dict[str, str] = {}
        self.turned: dict[str, str] = {}
        self.edited = False

    def _present(self) -> list[str]:
        return [id for id in self.order if id not in self.gone]

    def _insert(self, data: st.DataObject, put: Callable[[str, Node], None], place: Callable[[str], int]) -> None:
        anchor = data.draw(st.sampled_from(self.order))
        uses = data.draw(st.lists(st.sampled_from(self.order), max_size=2))
        id = self.draft.fresh("n")
        assert id not in self.order
        put(anchor, node(id, *uses))
        self.order.insert(place(anchor), id)
        self.uses[id] = uses
        self.beside[id] = anchor
        self.edited = True

    def _ancestors(self, id: str) -> set[str]:
        found = set()
        while id in self.beside:
            id = self.beside[id]
            found.add(id)
        return found

    def _end(self, anchor: str) -> int:
        index = self.order.index(anchor) + 1
        while index < len(self.order) and anchor in self._ancestors(self.order[index]):
            index += 1
        return index

    @rule(data=st.data())
    def insert_before(self, data: st.DataObject) -> None:
        self._insert(data, self.draft.insert_before, lambda anchor: self.order.index(anchor))

    @rule(data=st.data())
    def insert_after(self, data: st.DataObject) -> None:
        self._insert(data, self.draft.insert_after, self._end)

    @precondition(lambda self: self._present())
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self._present()))
        uses = data.draw(st.lists(st.sampled_from(self.order), max_size=2))
        self.draft.put(node(id, *uses))
        self.uses[id] = uses
        self.edited = True

    @rule(data=st.data())
    def put_the_same(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self.order))
        self.draft.put(self.draft[id])

    @precondition(lambda self: self._present())
    @rule(data=st.data())
    def erase(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self._present()))
        self.draft.erase([id])
        self.gone.add(id)
        self.edited = True

    @rule(data=st.data())
    def redirect(self, data: st.DataObject) -> None:
        old, new = data.draw(st.sampled_from(self.order)), data.draw(st.sampled_from(self.order))
        if self._turn_without(old, new) != old:
            self.draft.redirect(old, new)
            self.turned[old] = new
            self.edited = True

    def _turn_without(self, old: str, id: str) -> str:
        while id in self.turned and id != old:
            id = self.turned[id]
        return id

    def _turn(self, id: str) -> str:
        while id in self.turned:
            id = self.turned[id]
        return id

    @rule()
    def commit(self) -> None:
        after = self.draft.commit()
        assert repr(self.before) == self.text, "the draft's graph was changed"
        assert (after is self.before) == (not self.edited)
        for id in self.original:
            self.uses[id] = [self._turn(used) for used in self.uses[id]]
        self.order = self._present()
        self.uses = {id: self.uses[id] for id in self.order}
        assert list(after.order) == self.order
        assert {n.id: list(n.uses()) for n in after} == self.uses
        assert set(after.nodes) == set(self.order)
        if self.order:
            self.graph = after
        else:
            self.start(2)
        self._begin()

    @invariant()
    def no_edit_reaches_the_graph(self) -> None:
        assert self.graph is self.before


TestEdits = Edits.TestCase
TestEdits.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_fresh_ids_are_new_also_to_the_draft() -> None:
    draft = Draft(chain(1))
    first = draft.fresh("n0")
    draft.insert_after("n0", node(first))
    assert draft.fresh("n0") not in {"n0", first}
    assert fresh_id("a", ()) == "a"


def test_erased_ids_are_not_given_again() -> None:
    draft = Draft(chain(2))
    draft.erase(["n1"])
    assert draft.fresh("n1") != "n1"


def test_untouched_nodes_are_the_same_objects() -> None:
    before = chain(4)
    draft = Draft(before)
    draft.insert_after("n1", node("new", "n1"))
    draft.redirect("n1", "new")
    after = draft.commit()
    assert [id for id in before.order if after[id] is not before[id]] == ["n2"]


def _calls(work: Callable[[], object]) -> int:
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_edits_cost_as_much_per_node_in_large_graphs() -> None:
    def edit(length: int) -> Callable[[], object]:
        graph = chain(length)

        def work() -> Graph:
            draft = Draft(graph)
            for id in graph.order[::2]:
                new = draft.fresh(f"{id}_q")
                draft.insert_after(id, node(new, id))
                draft.redirect(id, new)
            return draft.commit()

        return work

    assert _calls(edit(4000)) < 22 * _calls(edit(200))
