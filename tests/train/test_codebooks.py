"""k-means initialisation, usage statistics and dead-code replacement."""

import math

import pytest
import torch

from ztok_fast.train.codebooks import CodebookCare, initialise_codebooks, keep_blocks, kmeans


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(count=6, width=4, each=30, spread=0.05):
    centres = 10 * torch.randn(count, width, generator=seeded(1))
    noise = spread * torch.randn(count * each, width, generator=seeded(2))
    return centres, centres.repeat_interleave(each, 0) + noise


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_finds_separated_clusters(seed):
    true, points = clusters()
    # Lloyd's algorithm keeps to the clusters that it starts in: with 40 starts it starts in all six.
    found = kmeans(points, 40, 10, seeded(seed))
    assert torch.cdist(true, found).min(1).values.max() < 0.2
    assert torch.cdist(points, found).min(1).values.max() < 0.5


def test_kmeans_is_deterministic_and_lowers_the_error():
    _, points = clusters(spread=3.0)
    errors = [torch.cdist(points, kmeans(points, 8, n, seeded())).min(1).values.square().mean() for n in (0, 1, 5)]
    assert errors[0] > errors[1] > errors[2]
    assert torch.equal(kmeans(points, 8, 5, seeded()), kmeans(points, 8, 5, seeded()))


def test_kmeans_of_fewer_points_than_centres_and_of_none():
    points = torch.tensor([[0.0], [1.0]])
    assert set(kmeans(points, 5, 3, seeded()).flatten().tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="expected at least one point, got none"):
        kmeans(torch.zeros(0, 2), 4, 1, seeded())


def test_each_level_starts_with_its_own_block_of_columns():
    _, points = clusters(width=5)
    codebooks = torch.randn(2, 40, 5)
    initialise_codebooks(codebooks, points, 5, seed=0)
    assert not codebooks[0, :, 2:].any() and not codebooks[1, :, :2].any()
    for codebook, columns in zip(codebooks, (slice(0, 2), slice(2, 5))):
        near = torch.cdist(points[:, columns], codebook[:, columns]).min(1).values
        assert near.max() < 0.5
    more_levels_than_columns = torch.randn(3, 4, 2)
    initialise_codebooks(more_levels_than_columns, points[:, :2], 2, seed=0)
    assert more_levels_than_columns.isfinite().all()


def test_keep_blocks_clears_the_rest():
    codebooks = torch.ones(2, 3, 4)
    keep_blocks(codebooks)
    assert codebooks[:, 0].tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


class TestCare:
    def care(self, usage, latents):
        care = CodebookCare(1, usage.shape[1], store=10)
        care.usage, care.latents = usage, latents
        return care

    def test_dead_codes_move_onto_recent_latents(self):
        latents = torch.randn(10, 2, generator=seeded()) + 5
        care = self.care(torch.tensor([[0.5, 0.001, 0.499, 0.0]]), latents)
        codebooks = torch.nn.Parameter(torch.zeros(1, 4, 2))
        replaced = care.replace_dead(codebooks, 0.1, seeded())
        assert [r.tolist() for r in replaced] == [[1, 3]]
        assert not codebooks[0, [0, 2]].any()
        for code in (1, 3):
            assert (codebooks[0, code] == latents).all(1).any()
        assert not torch.equal(codebooks[0, 1], codebooks[0, 3])
        assert care.usage[0].tolist() == pytest.approx([0.5, 0.25, 0.499, 0.25])
        assert care.replace_dead(codebooks, 0.1, seeded())[0].tolist() == []

    def test_later_levels_get_residuals(self):
        latents = torch.tensor([[4.0, 1.0], [4.0, -1.0]])
        care = CodebookCare(2, 2, store=4)
        care.observe(latents, None)
        care.usage = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
        codebooks = torch.nn.Parameter(torch.tensor([[[4.0, 0.0], [9.0, 9.0]], [[7.0, 7.0], [7.0, 7.0]]]))
        care.replace_dead(codebooks, 0.1, seeded())
        assert sorted(codebooks[1].tolist()) == [[0.0, -1.0], [0.0, 1.0]]

    def test_graph_of_an_earlier_step_never_goes_on_with_new_values(self):
        codebooks = torch.nn.Parameter(torch.full((1, 3, 2), 2.0))
        loss = codebooks.square().sum()  # needs the codebooks for its backward pass
        care = self.care(torch.zeros(1, 3), torch.full((4, 2), 100.0))
        assert len(care.replace_dead(codebooks, 0.1, seeded())[0]) == 3
        assert (codebooks == 100).all()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        codebooks.square().sum().backward()
        assert (codebooks.grad == 200.0).all()

    def test_nothing_to_draw_from_replaces_nothing(self):
        care = CodebookCare(2, 3, store=4)
        care.usage.zero_()
        codebooks = torch.nn.Parameter(torch.ones(2, 3, 2))
        assert [len(r) for r in care.replace_dead(codebooks, 0.1, seeded())] == [0, 0]
        assert (codebooks == 1).all()

    def test_perplexity_and_alive_codes(self):
        care = self.care(torch.tensor([[0.25] * 4]), torch.zeros(1, 2))
        assert care.perplexity() == pytest.approx([4.0]) and care.alive() == [4]
        care.usage = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        assert care.perplexity() == pytest.approx([1.0]) and care.alive() == [1]
        care.usage = torch.tensor([[0.5, 0.5, 0.0, 0.02]])
        assert care.perplexity()[0] == pytest.approx(
            math.exp(2 * -(0.5 / 1.02) * math.log(0.5 / 1.02) - 0.02 / 1.02 * math.log(0.02 / 1.02))
        )
        assert care.alive() == [2] and care.alive(0.01) == [3]

    def test_usage_follows_the_counts_and_latents_the_last_seen(self):
        care = CodebookCare(1, 2, store=3, decay=0.5)
        for step in range(20):
            care.observe(torch.full((2, 1), float(step), requires_grad=True), torch.tensor([[9, 1]]))
        assert care.usage[0].tolist() == pytest.approx([0.9, 0.1], abs=1e-4)
        assert care.latents.flatten().tolist() == [18.0, 19.0, 19.0] and not care.latents.requires_grad
        care.observe(torch.zeros(0, 1), torch.tensor([[0, 0]]))
        assert torch.isfinite(care.usage).all()
        other = CodebookCare(1, 2, store=3)
        other.load_state(care.state())
        assert torch.equal(other.usage, care.usage) and torch.equal(other.latents, care.latents)
