//! Calls that outlive their deadline.

use axum::extract::Request;
use axum::response::Response;
use tonic::codegen::Service as _;

use super::*;
use crate::door::deadline::answer_in_time;

/// The answer of a node that answers no call, if it is given within a day of the clock that tests have.
async fn ask(
    metrics: &Arc<DoorMetrics>,
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
    let (metrics, registry) = metrics();
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
    let text = crate::node::metrics::encode(&registry).unwrap();
    for method in ["put", "get"] {
        let line =
            format!("quorate_server_requests_total{{method=\"{method}\",outcome=\"deadline_exceeded\"}} 1");
        assert!(text.contains(&line), "{line} is not in {text}");
    }
    let unlimited = ask(&metrics, "/quorate.v1.Kv/Put", None).await;
    assert!(unlimited.is_none(), "a call without a deadline has all the time");
}

/// A method that is not found would be told as a read.
#[test]
fn every_call_of_the_services_is_known_by_its_path() {
    let methods = methods();
    let files: prost_types::FileDescriptorSet = prost::Message::decode(crate::proto::DESCRIPTORS).unwrap();
    let services = files.file.iter().filter(|file| file.package() == "quorate.v1");
    let mut found = std::collections::BTreeSet::new();
    for service in services.flat_map(|file| &file.service) {
        for call in &service.method {
            let path = format!("/quorate.v1.{}/{}", service.name(), call.name());
            // Its requests are counted one by one, and have no deadlines.
            if methods.is_pipeline(&path) {
                assert!(methods.may_change(&path) && methods.at(&path).is_none());
                continue;
            }
            let known = methods.at(&path).unwrap_or_else(|| panic!("{path}"));
            found.insert(methods.get(known).name);
        }
    }
    assert_eq!(found.len(), methods.list().len(), "{found:?}");
    for other in ["/livez", "/quorate.v1.Kv", "/quorate.v1.Kv/put", "/x.v1.Kv/Put", ""] {
        let known = methods.at(other);
        assert!(known.is_none() || other.ends_with("/put"), "{other}: {known:?}");
    }
    let changes = |path| methods.may_change(path);
    assert!(changes("/quorate.v1.Kv/Put") && changes("/quorate.v1.Admin/RemoveMember"));
    assert!(!changes("/quorate.v1.Kv/Range") && !changes("/quorate.v1.Admin/Status"));
}
