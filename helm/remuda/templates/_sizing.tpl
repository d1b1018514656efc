{{/* `remuda plan --format helm` says in `sizing` for which values its answer holds. Others are refused, by name. */}}
{{- define "remuda.checkSizing" -}}
{{- with .Values.sizing -}}
{{- $sizing := . -}}
{{- $moved := list -}}
{{- range $section := list "model" "parallel" "engine" -}}
{{- range $key, $sized := index $sizing $section -}}
{{- $value := index $.Values $section $key -}}
{{- $name := printf "%s.%s" $section $key -}}
{{- if not (include "remuda.fitsSizing" (dict "name" $name "value" $value "sized" $sized "device" $.Values.engine.device)) -}}
{{- $hint := ternary "; set sizing.model.path as well where it is the same model" "" (eq $name "model.path") -}}
{{- $moved = append $moved (printf "%s = %s (sized for %s%s)" $name (toJson $value) (toJson $sized) $hint) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if eq $.Values.engine.device "cpu" -}}
{{- $memory := $.Values.engine.resources.memory -}}
{{- if lt (mulf (include "remuda.bytes" $memory) $.Values.engine.hosts) (float64 .neededBytes) -}}
{{- $moved = append $moved (printf "engine.resources.memory = %s on each of %d hosts" $memory (int $.Values.engine.hosts)) -}}
{{- end -}}
{{- end -}}
{{- if $moved -}}
{{- fail (printf "%s: not what `remuda plan` made these values for: %s on %s, where a replica needs %d of %d bytes. Run `remuda plan --format helm` again for what you want, or set sizing to null and have the engine find out whether it fits" (join ", " $moved) .model.path .gpus (int64 .neededBytes) (int64 .availableBytes)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Whether a value takes no more memory than the one it was sized for. Call with (dict "name" … "value" … "sized" …
"device" …). */}}
{{- define "remuda.fitsSizing" -}}
{{- $fits := eq (toJson .value) (toJson .sized) -}}
{{- if eq .name "model.path" -}}
{{- $fits = eq (base .value) (base .sized) -}}
{{- else if eq .name "model.dtype" -}}
{{- $fits = or $fits (eq .value "bfloat16") -}}
{{- else if eq .name "model.maxLen" -}}
{{- $fits = or (eq (toString .value) "auto") (le (float64 .value) (float64 .sized)) -}}
{{- else if eq .name "model.maxNumSeqs" -}}
{{- /* 0: the device's default. */ -}}
{{- $fits = le (float64 (default (ternary 256 64 (eq .device "cuda")) (int .value))) (float64 .sized) -}}
{{- else if eq .name "model.extraArgs" -}}
{{- $fits = eq (include "remuda.sizedArgs" .value) (include "remuda.sizedArgs" .sized) -}}
{{- else if eq .name "engine.gpuMemoryUtilization" -}}
{{- $fits = ge (float64 .value) (float64 .sized) -}}
{{- else if eq .name "engine.kvCacheMemory" -}}
{{- $fits = le (float64 (include "remuda.bytes" .value)) (float64 (include "remuda.bytes" .sized)) -}}
{{- end -}}
{{- if $fits -}}yes{{- end -}}
{{- end -}}

{{/* The options among model.extraArgs that plan counts in, sorted. */}}
{{- define "remuda.sizedArgs" -}}
{{- $found := list -}}
{{- range . -}}
{{- if regexMatch "^--(max-num-batched-tokens|enable-eplb|num-redundant-experts|deterministic)(=|$)" . -}}
{{- $found = append $found . -}}
{{- end -}}
{{- end -}}
{{- sortAlpha $found | join " " -}}
{{- end -}}

{{/* Of a quantity as Kubernetes or `remuda serve` writes it: 1.5Gi, 512MiB, 1000. */}}
{{- define "remuda.bytes" -}}
{{- $factors := dict "" 1 "K" 1024 "M" 1048576 "G" 1073741824 "T" 1099511627776 -}}
{{- $unit := regexFind "[KMGT]" . -}}
{{- mulf (float64 (regexFind "^[0-9.]+" .)) (index $factors $unit) | printf "%.0f" -}}
{{- end -}}
