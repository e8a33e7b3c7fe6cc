"""Who asks for the same local Ray gets the one that is there; all others get one of their own."""

from __future__ import annotations

import pytest
import ray

from tests.servers.kept_ray import KeptRay


def test_a_local_ray_is_kept_for_who_asks_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(ray, "init", lambda **options: done.append(f"{options['address']} {options['num_cpus']}"))
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("end"))
    kept = KeptRay()

    def use(address: str = "local", num_cpus: int = 2) -> list[str]:
        done.clear()
        ray.init(address=address, num_cpus=num_cpus)
        ray.shutdown()
        return done

    assert use() == ["local 2"]
    assert use() == []
    assert use(num_cpus=3) == ["end", "local 3"]
    kept.keep = False
    assert use(num_cpus=3) == ["end", "local 3", "end"]
    kept.keep = True
    assert use() == ["local 2"]
    assert use("127.0.0.1:6379") == ["end", "127.0.0.1:6379 2", "end"]
    assert use() == ["local 2"]
    kept.end()
    assert done == ["local 2", "end"]
