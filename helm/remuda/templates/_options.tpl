{{/* Further options of the commands, refused where the command would not start with them or would do something else than
the other values say. An option that is not known here is left to the command: images may be newer than the chart. */}}
{{- define "remuda.checkExtraArgs" -}}
{{- $v := .Values -}}
{{- $byOtherValues := "given by other values of the chart; leave it out here" -}}
{{- $model := list "--served-model-name" "--device" "--dtype" "--tensor-parallel-size" "--tp" "--pipeline-parallel-size" "--pp" "--data-parallel-size" "--dp" "--expert-parallel-size" "--ep" "--max-model-len" "--gpu-memory-utilization" "--kv-cache-memory" "--quantization" "--max-num-seqs" -}}
{{- $process := list "--drain-timeout" "--otlp-endpoint" "--security-file" -}}
{{- $clients := list "--host" "--port" "--grpc-port" "--insecure" "--tenants" "--limits-store" "--limits-store-password-file" -}}
{{- $group := list "--secret-file" "--hosts" "--devices" "--node-ip" "--ray-port" "--leader-port" "--host-wait" "--health-port" "--topology" "--ray-token-file" -}}
{{- $discovery := list "--leaders" "--discover" "--watch-nodes" "--secret-file" "--served-model-name" -}}
{{- $ofFrontEnds := list "--lora-dir" "--pooling" "--request-timeout" "--queue-timeout" "--first-token-timeout" "--api-key-file" "--usage-log" "--audit-log" -}}
{{- if eq $v.engine.mode "single" -}}
{{- include "remuda.refuseOptions" (dict "key" "model.extraArgs" "given" $v.model.extraArgs "of" (concat $model $process $clients (list "--cpu-slots")) "why" $byOtherValues) -}}
{{- else -}}
{{- include "remuda.refuseOptions" (dict "key" "model.extraArgs" "given" $v.model.extraArgs "of" (concat $model $process $group) "why" $byOtherValues) -}}
{{- include "remuda.refuseOptions" (dict "key" "model.extraArgs" "given" $v.model.extraArgs "of" $ofFrontEnds "why" (printf "for front ends in engine.mode %s: put it into frontend.extraArgs" $v.engine.mode)) -}}
{{- include "remuda.refuseOptions" (dict "key" "model.extraArgs" "given" $v.model.extraArgs "of" (concat $clients (list "--replicas" "--max-replicas" "--address" "--cpu-slots")) "why" (printf "not an option of `remuda engine`, which engine.mode %s runs" $v.engine.mode)) -}}
{{- end -}}
{{- include "remuda.refuseOptions" (dict "key" "frontend.extraArgs" "given" $v.frontend.extraArgs "of" (concat $process $clients $discovery) "why" $byOtherValues) -}}
{{- end -}}

{{/* Call with (dict "key" of the values "given" them "of" what is refused "why" it is). */}}
{{- define "remuda.refuseOptions" -}}
{{- $found := list -}}
{{- range .given -}}
{{- $name := splitList "=" . | first -}}
{{- if has $name $.of -}}{{- $found = append $found $name -}}{{- end -}}
{{- end -}}
{{- if $found -}}{{- fail (printf "%s: %s: %s" .key (join ", " $found) .why) -}}{{- end -}}
{{- end -}}
