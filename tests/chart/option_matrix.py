"""Every preset in every engine mode, and every two options together at least once, in few renders (all-pairs)."""

import itertools
import random
from collections.abc import Iterator, Mapping
from functools import cache

from tests.chart.rendering import PRESETS, Values, merged, preset

_TLS = {"enabled": True, "existingSecret": "a-tls"}
_ISSUED = {"enabled": True, "certManager": {"enabled": True, "issuerName": "ca"}}
_PEER = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "edge"}}}

# Factor → level → values. The first two decide the layout; all others are independent of it unless `is_legal` says so.
FACTORS: Mapping[str, Mapping[str, Values]] = {
    "preset": {name: {} for name in PRESETS},
    "mode": {mode: {"engine": {"mode": mode}} for mode in ("lws", "kuberay", "single")},
    "weights": {
        "own": {},
        "disk": {"weights": {"source": "disk"}, "engine": {"nodeSelector": {"nvme": "yes"}}},
        "empty disk": {"weights": {"source": "disk", "existingClaim": ""}},
        "image": {"weights": {"source": "image", "image": "models/x@sha256:" + "1" * 64}},
    },
    "auth": {
        "made": {},
        "secret": {
            "auth": {"existingSecret": "keys"},
            "monitoring": {"tokenSecret": "scrape"},
            "tests": {"tokenSecret": "tester"},
        },
        "tokens": {
            "auth": {
                "jwt": [
                    {
                        "issuer": "https://i.example",
                        "audience": "llm",
                        "jwks": "https://i.example/k",
                        "tenant_claim": "t",
                    }
                ]
            },
            "monitoring": {"tokenSecret": "scrape"},
        },
        "certificates": {
            "auth": {"gateways": [{"name": "dns:edge"}], "certificates": [{"name": "dns:batch", "tenant": "batch"}]},
            "tls": {"clients": {"requireCertificate": True}},
            "monitoring": {"tokenSecret": "scrape"},
        },
        "insecure": {"auth": {"insecure": True}},
    },
    "tenants": {
        "unlimited": {},
        "limited": {"tenants": {"limits": {"tenants": {"search": {"weight": 2, "models": ["llama"]}}}}},
        "together": {
            "tenants": {
                "limits": {"default": {"requests_per_minute": 60}},
                "store": "rediss://redis.llm:6380/0",
                "storeSecret": "redis",
            }
        },
    },
    "clients": {"plain": {}, "secret": {"tls": {"clients": _TLS}}, "issued": {"tls": {"clients": _ISSUED}}},
    "internal": {"plain": {}, "secret": {"tls": {"internal": _TLS}}, "issued": {"tls": {"internal": _ISSUED}}},
    "secrets": {"made": {}, "given": {"secrets": {"existingSecret": "cluster"}}},
    "route": {
        "none": {},
        "gateway": {
            "gateway": {
                "enabled": True,
                "parentRefs": [{"name": "g"}],
                "hostnames": ["a.b"],
                "caConfigMap": "ca",
                "grpcHostnames": ["grpc.a.b"],
            }
        },
        "ingress": {"ingress": {"enabled": True, "host": "a.b", "className": "nginx", "tlsSecret": "host"}},
        "pool": {"inferencePool": {"enabled": True, "extensionService": "epp"}, "auth": {"insecure": True}},
        "gateway to pool": {
            "gateway": {"enabled": True, "parentRefs": [{"name": "g"}]},
            "inferencePool": {"enabled": True, "extensionService": "epp"},
            "auth": {"insecure": True},
        },
    },
    "scaling": {
        "none": {},
        "hpa": {"autoscaling": {"mode": "hpa"}},
        "keda": {"autoscaling": {"mode": "keda", "prometheusUrl": "http://p:9090"}},
    },
    "monitoring": {
        "none": {},
        "all": {
            "monitoring": {
                "podMonitor": True,
                "rules": True,
                "dashboards": True,
                "labels": {"release": "p"},
                "otlpEndpoint": "http://collector.monitoring:4317",
            }
        },
    },
    "network": {
        "closed": {"networkPolicy": {"clients": [_PEER], "monitoring": [_PEER], "apiServer": [_PEER]}},
        "clients only": {"networkPolicy": {"clients": [_PEER]}},
        "open": {},
        "none": {"networkPolicy": {"enabled": False}},
    },
    "accounts": {
        "made": {"rbac": {"watchNodes": True}, "serviceAccount": {"annotations": {"a": "b"}}},
        "given": {
            "serviceAccount": {"create": False, "frontendName": "front", "engineName": "eng"},
            "rbac": {"create": False},
        },
    },
    "placement": {
        "none": {},
        "all": {
            "engine": {
                "replicas": 3,
                "spreadTopologyKey": "topology.kubernetes.io/zone",
                "nodeSelector": {"gpu": "h100"},
                "tolerations": [{"key": "gpu", "operator": "Exists"}],
                "affinity": {"nodeAffinity": {}},
                "priorityClassName": "high",
                "podAnnotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
                "podLabels": {"team": "llm"},
                "extraEnv": [{"name": "NCCL_DEBUG", "value": "INFO"}],
                "extraVolumes": [{"name": "topology", "configMap": {"name": "nccl-topology"}}],
                "extraVolumeMounts": [{"name": "topology", "mountPath": "/etc/nccl", "readOnly": True}],
            },
            "frontend": {
                "nodeSelector": {"cpu": "yes"},
                "tolerations": [{"operator": "Exists"}],
                "podLabels": {"team": "llm"},
                "podAnnotations": {"a": "b"},
                "priorityClassName": "high",
                "extraEnv": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
                "extraArgs": ["--request-timeout=1800", "--lora-dir=/adapters"],
                "extraVolumes": [{"name": "records", "persistentVolumeClaim": {"claimName": "records"}}],
                "extraVolumeMounts": [{"name": "records", "mountPath": "/var/log/remuda"}],
                "readinessGates": ["target-health.elbv2.k8s.aws/remuda"],
            },
        },
        "exclusive": {"engine": {"exclusiveTopologyKey": "example.com/rack", "topologyLabels": []}},
        "rdma": {"engine": {"rdma": {"enabled": True, "count": 8}}},
    },
    "drains": {
        "equal": {},
        "long front end": {"frontend": {"unreadySeconds": 20, "drainSeconds": 300}},
        "long engine": {"engine": {"unreadySeconds": 15, "drainSeconds": 240}},
    },
    "options": {
        "none": {},
        "some": {
            "model": {"extraArgs": ["--guided-decoding-backend=xgrammar", "--max-num-batched-tokens=4096"]},
            "sizing": None,
        },
    },
    "image": {
        "default": {},
        "pinned": {
            "image": {"repository": "r.example/remuda", "digest": "sha256:" + "2" * 64, "pullSecrets": ["pull"]},
            "fullnameOverride": "llama",
        },
    },
}

Combination = Mapping[str, str]


def is_legal(chosen: Combination) -> bool:
    """Whether the chart must take it, of the factors that are chosen so far; test_refusals has what it refuses."""
    get = chosen.get
    is_single, is_kuberay = get("mode") == "single", get("mode") == "kuberay"
    has_tls = get("clients") in ("secret", "issued") or get("auth") == "certificates"
    return not (
        (is_single and (get("preset") == "405b-bf16" or get("internal") in ("secret", "issued")))
        or (get("mode") in ("single", "kuberay") and get("placement") == "exclusive")
        or (is_kuberay and get("scaling") in ("hpa", "keda"))
        or (get("preset") == "cpu-demo" and (get("placement") == "rdma" or get("weights") == "empty disk"))
        or (get("auth") == "certificates" and get("clients") == "plain")
        or (has_tls and get("route") in ("ingress", "pool", "gateway to pool"))
        or (get("route") in ("pool", "gateway to pool") and get("auth") in ("made", "secret", "tokens"))
    )


def values_of(chosen: Combination) -> Values:
    return merged(preset(chosen["preset"]), *(FACTORS[factor][level] for factor, level in chosen.items()))


@cache
def combinations() -> tuple[Combination, ...]:
    """The product of preset and mode, each with other levels, then as many as it takes until every legal pair of levels
    of different factors has come. Greedy: of some random completions the one with most new pairs."""
    source = random.Random(0)
    missing = set(_legal_pairs())
    found = []
    for name, mode in itertools.product(FACTORS["preset"], FACTORS["mode"]):
        if is_legal({"preset": name, "mode": mode}):
            found.append(_best({"preset": name, "mode": mode}, missing, source))
    while missing:
        (first, level), (second, other) = sorted(missing)[0]
        found.append(_best({first: level, second: other}, missing, source))
    return tuple(found)


def _best(start: Combination, missing: set[tuple[tuple[str, str], ...]], source: random.Random) -> Combination:
    tried = [found for _ in range(30) if (found := _completed(start, source)) is not None]
    best = max(tried, key=lambda found: len(_pairs(found) & missing), default=None)
    if best is None:
        raise AssertionError(f"{start} is legal by itself and with nothing else")
    missing -= _pairs(best)
    return best


def _completed(start: Combination, source: random.Random) -> Combination | None:
    chosen = dict(start)
    rest = [factor for factor in FACTORS if factor not in chosen]
    source.shuffle(rest)
    for factor in rest:
        levels = [level for level in FACTORS[factor] if is_legal({**chosen, factor: level})]
        if not levels:
            return None
        chosen[factor] = source.choice(levels)
    return {factor: chosen[factor] for factor in FACTORS}


def _pairs(chosen: Combination) -> set[tuple[tuple[str, str], ...]]:
    return set(itertools.combinations(chosen.items(), 2))


def _legal_pairs() -> Iterator[tuple[tuple[str, str], ...]]:
    for first, second in itertools.combinations(FACTORS, 2):
        for level, other in itertools.product(FACTORS[first], FACTORS[second]):
            if is_legal({first: level, second: other}):
                yield (first, level), (second, other)
