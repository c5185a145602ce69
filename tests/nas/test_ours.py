import os
import subprocess
import sys
from pathlib import Path


def test_another_package_named_kernels_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}
    code = "import sys; sys.path.remove('') if '' in sys.path else None; import nas.packing"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and str(tmp_path / "kernels") in last and "README" in last
