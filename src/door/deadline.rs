//! Deadlines of calls, in the header `grpc-timeout`: what is not done in time is told before the caller has gone.
//!
//! The transport looks after them too, and answers `CANCELLED` without saying whether a write was under way; and a
//! generic client gives up by itself at that moment, without any word from the server. So this one answers a little
//! earlier, with the [reason](crate::reason) and with whether the call may have been applied: a write that has been
//! proposed goes on, whoever waits for it.
//!
//! Here the way to the first byte of an answer is limited. Streams that are open at their deadline are ended by what
//! [completes](super::told) them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::middleware::Next;
use axum::response::Response;

use super::failure;
use super::metrics::DoorMetrics;
use crate::proto::v1::Failure;

/// The answer is given this part of the time before the deadline, for the way back.
const HEADROOM_PART: u32 = 10;
/// At most this long before it.
const HEADROOM_MAX: Duration = Duration::from_millis(100);

/// When whoever carries a call out is to have answered, if it can say more at that moment than that the time is over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AnswerBy(Instant);

impl AnswerBy {
    /// How long there is until then.
    pub(crate) fn left(&self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
}

/// Answers `request` by its deadline.
pub(crate) async fn answer_in_time(
    State(metrics): State<Arc<DoorMetrics>>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(limit) = limit(request.headers()) else { return next.run(request).await };
    let started = Instant::now();
    let method = metrics.methods().at(request.uri().path());
    request.extensions_mut().insert(AnswerBy(started + limit.saturating_sub(headroom(limit))));
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let changes = method.is_some_and(|method| metrics.methods().get(method).changes);
            let failure = failure::deadline_exceeded(changes);
            let outcome: Result<(), Failure> = Err(failure);
            if let Some(method) = method {
                metrics.observe(method, started, &outcome);
            }
            outcome.map_or_else(|failure| tonic::Status::from(failure).into_http(), |()| Response::default())
        }
    }
}

/// How long the answer may take, if that is limited.
pub(crate) fn limit(headers: &HeaderMap) -> Option<Duration> {
    let timeout = parse(headers.get("grpc-timeout")?.to_str().ok()?)?;
    Some(timeout.saturating_sub(headroom(timeout)))
}

fn headroom(time: Duration) -> Duration {
    (time / HEADROOM_PART).min(HEADROOM_MAX)
}

/// A number of at most eight digits, and its unit. What is none is no limit, as for the transport.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_read_as_the_protocol_writes_it() {
        for (text, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("3M", Some(Duration::from_secs(180))),
            ("2S", Some(Duration::from_secs(2))),
            ("1500m", Some(Duration::from_millis(1500))),
            ("99999999u", Some(Duration::from_micros(99_999_999))),
            ("7n", Some(Duration::from_nanos(7))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("", None),
            ("S", None),
            ("5", None),
            ("123456789S", None),
            ("-1S", None),
            ("+1S", None),
            ("1.5S", None),
            ("1ä", None),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }

    #[test]
    fn the_answer_has_time_for_its_way_back() {
        let limit = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", axum::http::HeaderValue::from_static(text));
            super::limit(&headers)
        };
        assert_eq!(limit("10S"), Some(Duration::from_millis(9900)));
        assert_eq!(limit("100m"), Some(Duration::from_millis(90)));
        assert_eq!(limit("0S"), Some(Duration::ZERO));
        assert_eq!(super::limit(&HeaderMap::new()), None);
    }
}
