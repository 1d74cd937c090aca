"""Host memory of captured steps: places in turn, and ids that outlive their place."""

from __future__ import annotations

from threading import Thread

import torch

from thalweg.runner.mailbox import PLACES, Mailbox


def test_places_come_in_turn_and_ids_stay_until_they_are_read() -> None:
    mailbox = Mailbox(2, 4, torch.device("cpu"))
    reads = []
    for step in range(2 * PLACES):
        mailbox.place()[:] = step
        assert mailbox.rows[step % PLACES].eq(step).all()
        mailbox.ids[step % PLACES] = 100 + step  # as the step does
        reads.append(mailbox.sent(1 + step % 4))
    for step, read in enumerate(reads):  # late: the second round has taken all places again
        assert read() == read() == [100 + step] * (1 + step % 4)


def test_it_begins_again_at_the_first_place() -> None:
    mailbox = Mailbox(2, 4, torch.device("cpu"))
    mailbox.turn.fill_(3)
    for _ in range(3):
        mailbox.place()
        mailbox.sent(1)
    mailbox.begin()
    mailbox.place()[:] = 7
    assert mailbox.rows[0].eq(7).all()
    assert mailbox.turn.item() == 0


def test_ids_are_read_once_if_a_place_is_wanted_while_they_are_read() -> None:
    mailbox, values = Mailbox(2, 4, torch.device("cpu")), [5, 6, 7]
    found: list[list[int]] = []
    other = Thread(target=lambda: found.append(list(read())))

    class Ids:
        def __getitem__(self, _: object) -> Ids:
            return self

        def tolist(self) -> list[int]:
            if other.ident is None:
                other.start()
                other.join(0.05)
            return values

    mailbox.ids = Ids()  # type: ignore[assignment]
    mailbox.place()
    read = mailbox.sent(3)
    assert read() == values
    other.join()
    assert found == [values]
    assert read() == values
