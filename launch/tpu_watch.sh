# One attempt at a study on all hosts of a slice, and attempt after attempt. Sourced by tpu_vm.sh.
#
# specdistill_jax.main ends with 0 (finished), 75 (pre-empted, or a peer was lost: saved, run it
# again), 2 (it refuses, and says why) or 1 (an unexpected error, which may pass). A host may also
# die of a signal, or not answer any more.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154  # names are shared with who sources this

SILENT_POLLS=20  # of hosts that should answer, while gcloud does
UNEVEN_SECONDS="${SPECDISTILL_UNEVEN_SECONDS:-300}"  # for hosts whose peers have ended

_weight() {  # code: how much it tells of the cause; hosts that wait for one that raised are killed
  if [ "$1" -gt 128 ]; then echo 1; elif [ "$1" = 1 ]; then echo 2; else echo 3; fi
}

# Token, lines `HOST TOKEN STATUS`: counts them. Leaves failed_host and failed_code of what weighs
# most, the first of equals.
_tally() {
  local wanted="$1" host token status weight heaviest=0
  running=0 finished=0 again=0 died=0 stopped=0 failed=0 answered=0 failed_host='' failed_code=0
  while read -r host token status; do
    [ -n "$host" ] || continue
    answered=$((answered + 1))
    [ "$token" = "$wanted" ] || status=lost  # the host was replaced, or never began
    case "$status" in
      running) running=$((running + 1)) ;;
      stopped:*) stopped=$((stopped + 1)) ;;
      exit:0) finished=$((finished + 1)) ;;
      exit:75) again=$((again + 1)) ;;
      exit:*)
        status="${status#exit:}"
        weight="$(_weight "$status")"
        if [ "$weight" -gt "$heaviest" ]; then
          heaviest="$weight" failed_host="$host" failed_code="$status"
        fi
        if [ "$status" -gt 128 ]; then died=$((died + 1)); else failed=$((failed + 1)); fi ;;
      *) again=$((again + 1)) ;;
    esac
  done <<< "$2"
}

# Some hosts have ended, without success, and others still run: those wait for lost peers.
# JAX notices by itself; where it does not, they are asked to end, then made to.
_even_out() {
  if [ "$((failed + again + died + stopped))" = 0 ]; then uneven_since=''; return; fi
  if [ -z "$uneven_since" ]; then
    uneven_since="$SECONDS" uneven_signal=TERM
    note "$running of $answered hosts run, the others have ended; waiting for them to notice"
  elif [ "$((SECONDS - uneven_since))" -ge "$UNEVEN_SECONDS" ]; then
    note "sending SIG$uneven_signal to the $running hosts that still run"
    ask_hosts signal "$uneven_signal" > /dev/null || true
    uneven_since="$SECONDS" uneven_signal=KILL
  fi
}

_verdict() {  # all hosts have ended; an error counts only on a slice that stands
  if [ "$stopped" -gt 0 ]; then echo stopped
  elif [ "$((failed + died))" -gt 0 ] && slice_was_taken; then echo taken
  elif [ "$failed" -gt 0 ]; then echo failed
  elif [ "$died" -gt 0 ]; then echo died
  elif [ "$again" -gt 0 ]; then echo again
  else echo finished
  fi
}

# Follows an attempt until all hosts have ended; token, number of hosts. Leaves the outcome:
#   finished, again, died (of a signal), failed (with a code), stopped (by the user),
#   taken (the slice), lost (a host, while the others have ended), silent (all hosts).
_watch() {
  local token="$1" hosts="$2" silent=0 uneven_since='' uneven_signal='' copied="$SECONDS"
  while :; do
    pause "$POLL_SECONDS"
    _tally "$token" "$(ask_hosts state || true)"
    if [ -n "$dry_run" ]; then outcome=finished; return; fi
    if [ "$answered" -ge "$hosts" ]; then
      silent=0
    else
      case "$(slice_state)" in
        GONE* | LEAVING* | ABSENT*) outcome=taken; return ;;
        READY*) silent=$((silent + 1)) ;;  # else gcloud is silent too, or repairs are under way
      esac
    fi
    if [ "$running" -gt 0 ]; then
      _even_out
      if [ "$((SECONDS - copied))" -ge "$COPY_SECONDS" ]; then
        keep_logs "$token"
        copied="$SECONDS"
      fi
      continue
    fi
    if [ "$answered" -gt 0 ]; then
      outcome="$(_verdict)"
      [ "$answered" -ge "$hosts" ] && return
      case "$outcome" in finished | failed | stopped) return ;; esac
    fi
    if [ "$silent" -ge "$SILENT_POLLS" ]; then
      if [ "$answered" = 0 ]; then outcome=silent; else outcome=lost; fi
      return
    fi
  done
}

_token_of_ours() {  # checksum of the command: token of the attempt that runs; 1 if another runs
  local host token status
  while read -r host token status; do
    [ "$status" = running ] || continue
    if [ "${token%%-*}" != "$1" ]; then
      note "$host runs another command; \`stop\` it first"
      return 1
    fi
    printf '%s\n' "$token"
    return
  done <<< "$(ask_hosts state || true)"
}

# Token of an attempt: leaves number and began (seconds since 1970). What is recorded of the last
# one outlives this launcher, so that another, which takes the attempt up, knows them too.
_number() {
  local recorded=''
  number=0 began="$(date '+%s')"
  if [ -s "$records/attempt" ]; then read -r number recorded began < "$records/attempt"; fi
  [ "$recorded" != "$1" ] || return 0
  number=$((number + 1)) began="$(date '+%s')"
  [ -n "$dry_run" ] || printf '%s\n' "$number $1 $began" > "$records/attempt"
}

# Words of `start`: sets up if need be, starts or takes up, follows. Leaves outcome, and began.
_attempt() {
  local sum token='' lines
  sum="$(quote "$@" | cksum | cut -d' ' -f1)"
  outcome=broken
  if [ "$needs_setup" != bare ]; then
    token="$(_token_of_ours "$sum")" || { outcome=busy; return; }
  fi
  if [ -n "$token" ]; then
    note "this very command runs there, commit $(commit_on_hosts): following it"
  else
    if [ -n "$needs_setup" ]; then
      setup || { note 'the hosts could not be set up'; return; }
    fi
    started=$((${started:-0} + 1))  # two attempts may begin in one second
    token="$sum-$(date '+%m%d%H%M%S')-$$-$started"
    needs_setup=''
  fi
  _number "$token"
  # A host that was started before is not started twice, so this may be said again.
  lines="$(ask_hosts start "$token" "$@")" || { note 'not every host answers'; return; }
  if [ -z "$dry_run" ]; then
    note "$(printf '%s\n' "$lines" | wc -l | tr -d ' ') hosts run commit $(commit_on_hosts):" \
         "$(quote "$@")"
  fi
  _watch "$token" "$(printf '%s\n' "$lines" | wc -l)"
  if [ "$outcome" != silent ]; then keep_logs "$token"; fi
}

_lasted() { echo "$(($(date '+%s') - began))"; }  # the attempt that has ended, in seconds

_give_up() {  # for a code of the study: that it is the study's is recorded, and how long it ran
  printf '%s\n' "$failed_code $(_lasted)" > "$records/failed"
}

# After an error: whether to try again. What the study refuses (2) stays as it is; a surprise (1)
# may pass, such as a bucket that does not answer.
_may_pass() {
  [ "$failed_code" = 1 ] || return 1
  if [ "$(_lasted)" -ge "$QUICK_SECONDS" ]; then errors=0; fi
  errors=$((errors + 1))
  [ "$errors" -lt "$TRIES" ] && [ "$restarts" -lt "$max_restarts" ]
}

# Attempt after attempt, until the study ends or there is no hope. Whether the slice may be asked
# for (yes or no), words of `start`. Returns main's code, AGAIN or UNAVAILABLE.
run_to_the_end() {
  local may_create="$1" restarts=0 broken=0 deaths=0 errors=0 outcome
  shift
  while :; do
    if [ "$may_create" = yes ]; then
      await_slice || return "$UNAVAILABLE"
    elif [ -z "$dry_run" ] && slice_was_taken; then
      note 'there is no slice; tpu_vm.sh up asks for one'
      return "$UNAVAILABLE"
    fi
    _attempt "$@"
    case "$outcome" in
      finished) note "finished; the results are in $workdir"; return 0 ;;
      stopped) note 'stopped; the same command goes on from where it was'; return "$AGAIN" ;;
      failed)
        show_failure
        if ! _may_pass; then _give_up; return "$failed_code"; fi ;;
      busy) return "$UNAVAILABLE" ;;
      silent)
        note 'the slice stands, but no host answers by ssh: see why, then give the same command'
        return "$AGAIN" ;;
      broken)
        if slice_was_taken; then outcome=taken; else broken=$((broken + 1)); fi
        if [ "$broken" -ge "$TRIES" ]; then
          note 'the study cannot be started; what gcloud last said:'
          tail -n 5 -- "$records/ssh.txt" >&2
          return "$AGAIN"
        fi ;;
      died)
        deaths=$((deaths + 1))
        if [ "$deaths" -ge "$TRIES" ]; then
          show_failure
          _give_up
          return "$failed_code"
        fi ;;
      lost) if [ "$may_create" = yes ]; then delete_slice || true; fi ;;
    esac
    [ "$outcome" = broken ] || broken=0
    [ "$outcome" = died ] || deaths=0
    restarts=$((restarts + 1))
    if [ "$restarts" -gt "$max_restarts" ]; then
      note "given up after $max_restarts restarts; what was saved is in $workdir"
      return "$AGAIN"
    fi
    note "$(_reason "$outcome"); restart $restarts of at most $max_restarts"
    pause "$POLL_SECONDS"
  done
}

_reason() {  # outcome
  case "$1" in
    again) echo 'pre-empted, or a host was lost; the state is saved' ;;
    failed) echo "an unexpected error, $errors of at most $TRIES in a row" ;;
    died) echo "$failed_host died of signal $((failed_code - 128))" ;;
    taken) echo 'the slice was taken away' ;;
    lost) echo 'a host does not answer any more' ;;
    broken) echo 'the study could not be started' ;;
  esac
}
