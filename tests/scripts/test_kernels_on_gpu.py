import pytest

from scripts import bench_kernels, kernels_on_gpu, options


def test_drawn_cases_are_the_same_in_every_run_and_divide_into_their_blocks() -> None:
    cases = list(kernels_on_gpu.drawn(200, tuned=True))
    assert cases == list(kernels_on_gpu.drawn(200, tuned=True)) and len(set(map(str, cases))) > 180
    for case in cases:
        if isinstance(case, kernels_on_gpu.Linear):
            assert case.rows % case.block == case.columns % case.block == 0
            assert case.tuned and not case.with_peers
        else:
            assert case.channels % case.block == 0 and case.tuned
    kinds = {type(case) for case in cases}
    assert kinds == {kernels_on_gpu.Linear, kernels_on_gpu.Conv2d}


@pytest.mark.parametrize(
    ("given", "law"),
    [
        (["--drawn", "3"], "--drawn goes with --device cuda, and --tuned with --drawn"),
        (["--device", "cuda", "--tuned"], "--drawn goes with --device cuda"),
        (["--device", "cuda", "--drawn", "-3"], "--drawn must not be negative, got -3"),
    ],
)
def test_what_does_not_go_together_is_refused(
    given: list[str],
    law: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(options, "has_driver", lambda: True)
    with pytest.raises(SystemExit):
        bench_kernels.main(given)
    assert law in capsys.readouterr().err
