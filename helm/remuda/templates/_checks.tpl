{{/* Values that the schema lets through and that cannot work together are refused here, with the keys to be changed. */}}
{{- define "remuda.check" -}}
{{- include "remuda.checkName" . -}}
{{- include "remuda.checkLayout" . -}}
{{- include "remuda.checkWeights" . -}}
{{- include "remuda.checkTls" . -}}
{{- include "remuda.checkAuth" . -}}
{{- include "remuda.checkRoutes" . -}}
{{- include "remuda.checkScaling" . -}}
{{- include "remuda.checkExtraArgs" . -}}
{{- include "remuda.checkSizing" . -}}
{{- end -}}

{{- define "remuda.checkName" -}}
{{- $name := include "remuda.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "%s, made of the release's name, cannot name a Service: set fullnameOverride to a name of a-z, 0-9 and - that begins with a letter" $name) -}}
{{- end -}}
{{- end -}}

{{- define "remuda.checkLayout" -}}
{{- $p := .Values.parallel -}}
{{- $e := .Values.engine -}}
{{- $ranks := mul $p.pipeline $p.data $p.tensor | int -}}
{{- $devices := mul $e.hosts $e.devicesPerHost | int -}}
{{- if ne $ranks $devices -}}
{{- fail (printf "parallel.pipeline × parallel.data × parallel.tensor = %d × %d × %d = %d ranks, but engine.hosts × engine.devicesPerHost = %d × %d = %d devices; make them equal" (int $p.pipeline) (int $p.data) (int $p.tensor) $ranks (int $e.hosts) (int $e.devicesPerHost) $devices) -}}
{{- end -}}
{{- if mod (mul $p.data $p.tensor) $p.expert -}}
{{- fail (printf "parallel.expert = %d must divide parallel.data × parallel.tensor = %d" (int $p.expert) (mul $p.data $p.tensor | int)) -}}
{{- end -}}
{{- if mod $e.devicesPerHost $p.tensor -}}
{{- fail (printf "parallel.tensor = %d must divide engine.devicesPerHost = %d: its ranks share every layer and stay on one host; use parallel.pipeline across hosts" (int $p.tensor) (int $e.devicesPerHost)) -}}
{{- end -}}
{{- if and (eq $e.mode "single") (gt (int $e.hosts) 1) -}}
{{- fail (printf "engine.mode single runs a replica in one pod, but engine.hosts = %d; use lws or kuberay" (int $e.hosts)) -}}
{{- end -}}
{{- if and $e.rdma.enabled (ne $e.device "cuda") -}}
{{- fail "engine.rdma.enabled is for engine.device cuda" -}}
{{- end -}}
{{- if and $e.exclusiveTopologyKey (ne $e.mode "lws") -}}
{{- fail (printf "engine.exclusiveTopologyKey is the LeaderWorkerSet's and has no effect in engine.mode %s; leave it empty" $e.mode) -}}
{{- end -}}
{{- end -}}

{{- define "remuda.checkWeights" -}}
{{- $w := .Values.weights -}}
{{- if and (eq $w.source "none") (ne .Values.model.path "remuda-tiny") -}}
{{- fail (printf "model.path = %s needs weights.source pvc, disk or image; only remuda-tiny is in the image" .Values.model.path) -}}
{{- end -}}
{{- if and (eq $w.source "pvc") (not $w.existingClaim) -}}
{{- fail "weights.existingClaim is empty; name a claim that many pods can mount (ReadOnlyMany or ReadWriteMany)" -}}
{{- end -}}
{{- if and (include "remuda.fills" .) (not .Values.engine.nodeSelector) (not .Values.engine.affinity.nodeAffinity) -}}
{{- fail (printf "weights.source disk with weights.existingClaim fills disks by a Job, which must know the engines' nodes (those that have %s): set engine.nodeSelector or engine.affinity.nodeAffinity" $w.hostPath) -}}
{{- end -}}
{{- if and (eq $w.source "image") (not (contains "@sha256:" $w.image)) -}}
{{- fail "weights.image must be an image reference with its digest, as in registry/models/llama@sha256:…" -}}
{{- end -}}
{{- if and (eq $w.source "image") (semverCompare "<1.31.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "weights.source image needs Kubernetes 1.31, and this is %s; use pvc or disk" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end -}}

{{- define "remuda.checkTls" -}}
{{- range $key := list "clients" "internal" -}}
{{- $tls := index $.Values.tls $key -}}
{{- if and $tls.enabled (not $tls.existingSecret) (not $tls.certManager.enabled) -}}
{{- fail (printf "tls.%s.enabled needs tls.%s.existingSecret or tls.%s.certManager.enabled" $key $key $key) -}}
{{- end -}}
{{- if and $tls.certManager.enabled (not $tls.enabled) -}}
{{- fail (printf "tls.%s.certManager.enabled makes a certificate that nothing uses: set tls.%s.enabled" $key $key) -}}
{{- end -}}
{{- if and $tls.certManager.enabled $tls.existingSecret -}}
{{- fail (printf "tls.%s.existingSecret and tls.%s.certManager.enabled exclude each other" $key $key) -}}
{{- end -}}
{{- if and $tls.certManager.enabled (not $tls.certManager.issuerName) -}}
{{- fail (printf "tls.%s.certManager.issuerName is empty" $key) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.tls.internal.enabled (eq .Values.engine.mode "single") -}}
{{- fail "tls.internal.enabled is for engine.mode lws and kuberay: a pod of single talks to no other" -}}
{{- end -}}
{{- if and .Values.tls.clients.requireCertificate (not .Values.tls.clients.enabled) -}}
{{- fail "tls.clients.requireCertificate needs tls.clients.enabled" -}}
{{- end -}}
{{- end -}}

{{- define "remuda.checkAuth" -}}
{{- $a := .Values.auth -}}
{{- if and .Values.tenants.storeSecret (not .Values.tenants.store) -}}
{{- fail "tenants.storeSecret is the password of tenants.store, which is empty" -}}
{{- end -}}
{{- if and $a.insecure (or $a.existingSecret $a.jwt $a.certificates $a.gateways) -}}
{{- fail "auth.insecure lets everybody in: leave auth.existingSecret, auth.jwt, auth.certificates and auth.gateways empty, or insecure false" -}}
{{- end -}}
{{- range $key := list "certificates" "gateways" -}}
{{- if and (index $a $key) (not $.Values.tls.clients.requireCertificate) -}}
{{- fail (printf "auth.%s needs tls.clients.requireCertificate" $key) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.monitoring.podMonitor (not .Values.monitoring.tokenSecret) (not (or $a.insecure (include "remuda.makesKey" .))) -}}
{{- fail "monitoring.tokenSecret is empty: metrics ask for an API key with the scope metrics" -}}
{{- end -}}
{{- end -}}

{{- define "remuda.checkRoutes" -}}
{{- if and .Values.gateway.enabled (not .Values.gateway.parentRefs) -}}
{{- fail "gateway.parentRefs is empty; name the gateway that the routes belong to" -}}
{{- end -}}
{{- if and .Values.gateway.enabled .Values.tls.clients.enabled (not .Values.gateway.caConfigMap) -}}
{{- fail "gateway.caConfigMap is empty; with tls.clients.enabled the gateway must know by which CA front ends are certified" -}}
{{- end -}}
{{- if and .Values.gateway.enabled .Values.gateway.grpcHostnames -}}
{{- $both := list -}}
{{- range .Values.gateway.grpcHostnames -}}{{- if has . $.Values.gateway.hostnames -}}{{- $both = append $both . -}}{{- end -}}{{- end -}}
{{- if or $both (not .Values.gateway.hostnames) -}}
{{- fail (printf "gateway.grpcHostnames = %s: gateway.hostnames must name others, as a gateway takes only one of an HTTPRoute and a GRPCRoute for the same name" (join ", " .Values.gateway.grpcHostnames)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.host is empty" -}}
{{- end -}}
{{- if and .Values.ingress.enabled .Values.tls.clients.enabled -}}
{{- fail "ingress.enabled and tls.clients.enabled exclude each other: an Ingress cannot say how its backend is certified; use gateway.enabled" -}}
{{- end -}}
{{- if and .Values.inferencePool.enabled (not .Values.auth.insecure) -}}
{{- fail "inferencePool.enabled needs auth.insecure: endpoint pickers read metrics without credentials; have the gateway authenticate, and limit networkPolicy.clients to it" -}}
{{- end -}}
{{- if and .Values.inferencePool.enabled .Values.tls.clients.enabled -}}
{{- fail "inferencePool.enabled and tls.clients.enabled exclude each other: endpoint pickers read metrics in plain text" -}}
{{- end -}}
{{- if and .Values.inferencePool.enabled (not .Values.inferencePool.extensionService) -}}
{{- fail "inferencePool.extensionService is empty; name the endpoint picker's Service" -}}
{{- end -}}
{{- end -}}

{{- define "remuda.checkScaling" -}}
{{- $a := .Values.autoscaling -}}
{{- if and (eq $a.mode "keda") (not $a.prometheusUrl) -}}
{{- fail "autoscaling.prometheusUrl is empty; KEDA reads the queue's length there" -}}
{{- end -}}
{{- if and (ne $a.mode "none") (eq .Values.engine.mode "kuberay") -}}
{{- fail (printf "autoscaling.mode %s needs engine.mode lws or single: RayClusters are not scaled by number" $a.mode) -}}
{{- end -}}
{{- if lt (int $a.maxReplicas) (int $a.minReplicas) -}}
{{- fail (printf "autoscaling.maxReplicas = %d is below autoscaling.minReplicas = %d" (int $a.maxReplicas) (int $a.minReplicas)) -}}
{{- end -}}
{{- end -}}
