//! Who makes a request, whether it may, and what follows from that for the answer.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::settings::Refused;
use super::{http, replication};
use crate::door::Credentials;
use crate::door::bodies::is_grpc;
use crate::door::failure;
use crate::door::permitted::PermittedBody;
use crate::door::rights::audit::{self, AuditedCall};
use crate::door::rights::table::{self, CallRight, Page};
use crate::door::rights::{CountedCall, PresentedCredential, Principal};
use crate::incoming::Caller;
use crate::proto::v1::Failure;
use crate::reason::Reason;

/// For so long what was begun on a pipeline is answered after the credential of its caller has ended. Nothing more is read from it.
pub(super) const PIPELINE_GRACE: Duration = Duration::from_secs(5);

/// A request whose caller is known, and may make it.
pub(super) struct PermittedRequest {
    principal: Arc<Principal>,
    /// Whether something is to be changed about the node or the cluster, by whom is then told in the log.
    operates: bool,
    caller: Arc<Caller>,
    counted: Option<CountedCall>,
    /// Whether its answer tells whoever asks as much as the node has to say.
    is_open: bool,
}

/// Finds out who makes `request` on the connection of `caller`, and whether it may.
///
/// # Errors
/// The answer, when it may not.
pub(super) fn admit(
    credentials: Option<&Credentials>,
    request: &Request,
    caller: &Arc<Caller>,
) -> Result<PermittedRequest, Response> {
    let path = request.uri().path();
    let right = table::of_request(request.method(), path);
    let operates = right == Some(CallRight::Operate);
    let permitted = |principal, counted, is_open| PermittedRequest {
        principal,
        operates,
        caller: caller.clone(),
        counted,
        is_open,
    };
    let admitted = |principal, counted| permitted(principal, counted, true);
    let Some(credentials) = credentials else { return Ok(admitted(Principal::everyone(), None)) };
    let shown = shown_by(caller, bearer(request.headers()));
    if right == Some(CallRight::Nothing) {
        return Ok(permitted(Principal::nobody(), None, credentials.observes(shown)));
    }
    let asked = AuditedCall { path, address: caller.address() };
    match credentials.admit(shown, right, &asked) {
        // Whatever is behind it: nobody has said who may ask for it.
        Ok(_) if right.is_none() => Err(http::unknown(request.headers(), request.uri())),
        Ok(principal) => match principal.begin().and_then(|counted| principal.ask().map(|()| counted)) {
            Ok(counted) => Ok(admitted(Arc::new(principal), counted)),
            Err(_) => Err(refusal(failure::too_much_asked(), is_grpc(request.headers()))),
        },
        Err(failure) => Err(refusal(failure, is_grpc(request.headers()))),
    }
}

/// What a caller shows who has said `bearer`.
pub(super) fn shown_by<'a>(caller: &'a Caller, bearer: Option<&'a str>) -> PresentedCredential<'a> {
    match caller.certificate() {
        None => PresentedCredential { bearer, ..PresentedCredential::default() },
        Some(shown) => {
            PresentedCredential { bearer, certificate: &shown.names, certificate_expires: shown.expires_s }
        }
    }
}

/// The token that a request shows. One that is shown in another way than it should be is a wrong one.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    const UNREADABLE: &str = "";
    let mut shown = headers.get_all(header::AUTHORIZATION).iter();
    let (first, another) = (shown.next()?, shown.next());
    let text = first.to_str().ok().filter(|_| another.is_none()).unwrap_or(UNREADABLE);
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => Some(token.trim()),
        _ => Some(UNREADABLE),
    }
}

fn refusal(failure: Failure, is_grpc: bool) -> Response {
    let reason = failure.reason();
    if is_grpc {
        return tonic::Status::from(failure).into_http();
    }
    let code = StatusCode::from_u16(reason.http_status(false));
    let code = code.expect("invariant: the table holds statuses of HTTP");
    let hint = match reason {
        Reason::LimitReached => "try again after a pause",
        _ => "docs/SECURITY.md says who may ask for what",
    };
    let refused = Refused::new(failure.message, hint);
    let mut answer = replication::refusal(code, reason, None, &refused);
    if reason == Reason::Unauthenticated {
        answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    answer
}

impl PermittedRequest {
    /// Whether it keeps its connection from giving way. What everybody may ask for keeps no place from those who have shown who they are.
    pub(super) fn keeps_place(&self, credentials: Option<&Credentials>) -> bool {
        credentials.is_none() || self.principal.can_end()
    }

    /// Has `request` answered by `next`. What is still being sent `grace` after the caller's credential has ended, ends.
    pub(super) async fn serve(self, mut request: Request, next: Next, grace: Duration) -> Response {
        let Self { principal, operates, caller, counted, is_open } = self;
        let is_grpc = is_grpc(request.headers());
        let is_stream = table::is_stream(request.uri().path());
        let path = operates.then(|| request.uri().path().to_owned());
        let call = path.as_ref().map(|path| AuditedCall { path, address: caller.address() });
        if let Some(call) = call.filter(|call| call.path == Page::ReplicationConfigure.path()) {
            // Before it is done, for it may be that less is logged from then on.
            principal.operated(&call, audit::ASKED);
        }
        request.extensions_mut().insert(principal.clone());
        let response = next.run(request).await;
        if !is_open && response.status() == StatusCode::SERVICE_UNAVAILABLE {
            // Why stands on a page that takes a right.
            return (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response();
        }
        if let Some(call) = call {
            principal.operated(&call, &outcome(&response));
        }
        match is_grpc && principal.can_end() {
            true => {
                let unread = is_stream.then_some(caller);
                response.map(|body| Body::new(PermittedBody::new(body, principal, grace, counted, unread)))
            }
            false => response,
        }
    }
}

/// What came of a call that is answered at once.
fn outcome(response: &Response) -> String {
    match tonic::Status::from_header_map(response.headers()) {
        Some(status) => audit::outcome(Some(&status)).to_owned(),
        None if response.status().is_success() => audit::outcome(None).to_owned(),
        None => response.status().as_u16().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_shown_in_one_way() {
        let shown = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, HeaderValue::from_static(value));
            }
            bearer(&headers).map(str::to_owned)
        };
        assert_eq!(shown(&[]), None);
        assert_eq!(shown(&["Bearer abc"]).as_deref(), Some("abc"));
        assert_eq!(shown(&["bearer  abc "]).as_deref(), Some("abc"));
        for wrong in [&["abc"][..], &["Basic abc"], &["Bearer abc", "Bearer abc"], &["Bearer"], &[""]] {
            assert_eq!(shown(wrong).as_deref(), Some(""), "{wrong:?}");
        }
    }
}
