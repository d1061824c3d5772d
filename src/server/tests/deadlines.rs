//! Calls that outlive their deadline.

use axum::extract::Request;
use axum::response::Response;
use tonic::codegen::Service as _;

use super::*;
use crate::server::deadline::answer_in_time;

/// The answer of a node that answers no call, if it is given within a day of the clock that tests have.
async fn ask(
    metrics: &Arc<Metrics>,
    path: &'static str,
    timeout: Option<&'static str>,
) -> Option<tonic::Status> {
    let never = || async { std::future::pending::<Response>().await };
    let limited = axum::middleware::from_fn_with_state(metrics.clone(), answer_in_time);
    let mut router = axum::Router::new().fallback(never).layer(limited);
    let mut request = Request::new(axum::body::Body::empty());
    *request.uri_mut() = path.parse().unwrap();
    if let Some(timeout) = timeout {
        request.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
    }
    let answer = tokio::time::timeout(Duration::from_secs(86_400), router.call(request)).await;
    answer.ok().map(|answer| tonic::Status::from_header_map(answer.unwrap().headers()).unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_write_that_outlives_its_deadline_may_have_been_applied_and_a_read_not() {
    let metrics = Arc::new(Metrics::new(FakeNode::new(), Vec::new()));
    for (path, maybe_applied) in [
        ("/quorate.v1.Kv/Put", true),
        ("/quorate.v1.Kv/Txn", true),
        ("/quorate.v1.Admin/RemoveMember", true),
        ("/quorate.v1.Kv/Get", false),
        ("/quorate.v1.Kv/RangeStream", false),
        ("/grpc.health.v1.Health/Check", false),
    ] {
        let begun = tokio::time::Instant::now();
        let status = ask(&metrics, path, Some("1S")).await.expect("an answer");
        // Timers have a resolution of a millisecond.
        let took = begun.elapsed();
        assert!((900..905).contains(&took.as_millis()), "{path}: {took:?}");
        assert_eq!(status.code(), Code::DeadlineExceeded, "{path}");
        let failure = details::failure(status.details()).unwrap();
        assert_eq!(failure.reason(), Reason::DeadlineExceeded, "{path}");
        assert_eq!((failure.maybe_applied, failure.code), (maybe_applied, status.code() as i32), "{path}");
        assert_eq!(status.message(), failure.message);
    }
    let text = metrics.encode().unwrap();
    for method in ["put", "get"] {
        let line =
            format!("quorate_server_requests_total{{method=\"{method}\",outcome=\"deadline_exceeded\"}} 1");
        assert!(text.contains(&line), "{line} is not in {text}");
    }
    let unlimited = ask(&metrics, "/quorate.v1.Kv/Put", None).await;
    assert!(unlimited.is_none(), "a call without a deadline has all the time");
}
