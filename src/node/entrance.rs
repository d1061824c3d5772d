//! What stands before every door of the client port: which requests are let in at all, and what they are counted as.
//!
//! Each request is identified by its credential ([`rights`](crate::door::rights)), and refused unless the table grants its caller the
//! call; a path that does not stand there is refused, too. Where a node has no credentials, whatever can make a connection to it can use it.
//! A browser can, for any page that its user happens to look at. A page may send a request without asking first if it looks like a form: any path and
//! body, as `text/plain`, over HTTP/1.1. And a page whose host name suddenly means this node's address (DNS rebinding)
//! may send what it likes. What neither of them can do is what is asked for here:
//!
//! - *Host*: an IP address, a loopback name, a name that this node is known by, or one that its settings allow. No `Host`
//!   at all is no browser's.
//! - *Origin*, which browsers name with whatever could change something: none, the `Host` itself, or one that the settings
//!   allow.
//! - *gRPC*: `POST` of `application/grpc` over HTTP/2. A page cannot send that type unasked, nor can a browser be made to
//!   speak HTTP/2 without TLS.
//! - *JSON*: what is posted is `application/json`.
//!
//! A connection in a place that is kept back is served what probes and operators ask for, and nothing else.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::ADMIN;
use super::identified;
use super::replication;
use super::settings::Refused;
use super::subscriptions::SUBSCRIBE_PATH;
use crate::door::Credentials;
use crate::door::bodies::{Arriving, Built, Framing, Leaving, SHORTAGE_PATIENCE, content_type, is_grpc};
use crate::door::failure;
use crate::door::limits::DoorLimits;
use crate::door::methods::Methods;
use crate::incoming::{Caller, Held};
use crate::proto::v1::Failure;
use crate::reason::Reason;

/// Longest part of a request that is repeated in an answer.
const ECHOED_CHARS: usize = 100;

/// What an answer to an operator's call counts as until it is encoded: no less than any takes.
const OPERATORS_ANSWER_BYTES: usize = 256 * 1024;
/// The call that is answered with most.
const LIST_SESSIONS: &str = "/quorate.v1.Admin/ListSessions";

/// The names that a node is called by, beside addresses and loopback names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    hosts: Vec<String>,
    origins: Vec<String>,
}

impl Names {
    /// `hosts` without ports, `origins` as browsers write them: `https://console.example.com`. A host that begins with
    /// `*.` stands for every name below the rest of it; `*` alone for every name and every origin.
    pub fn new(hosts: impl IntoIterator<Item = String>, origins: impl IntoIterator<Item = String>) -> Self {
        let lower = |name: String| name.trim_end_matches(['.', '/']).to_ascii_lowercase();
        Self {
            hosts: hosts.into_iter().map(lower).collect(),
            origins: origins.into_iter().map(lower).collect(),
        }
    }

    /// These, and the host of `address`, a `host:port`.
    #[must_use]
    pub fn and_host_of(mut self, address: &str) -> Self {
        let (host, _) = split_port(address);
        self.hosts.push(host.trim_end_matches('.').to_ascii_lowercase());
        self
    }

    /// Whether `authority`, a host with or without a port, may mean this node.
    fn knows_host(&self, authority: &str) -> bool {
        let (host, _) = split_port(authority);
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        let is_address = host.parse::<Ipv4Addr>().is_ok()
            || host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).is_some_and(|host| {
                // With a zone, which only means something on this machine.
                host.split('%').next().is_some_and(|host| host.parse::<Ipv6Addr>().is_ok())
            });
        let is_loopback = host == "localhost" || host.ends_with(".localhost");
        is_address || is_loopback || self.hosts.iter().any(|known| stands_for(known, &host))
    }

    /// Whether a page of `origin` may ask what it asks of `authority`.
    fn knows_origin(&self, origin: &str, authority: Option<&str>) -> bool {
        let origin = origin.to_ascii_lowercase();
        let same = authority.is_some_and(|authority| {
            let host = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
            host == Some(&*authority.to_ascii_lowercase())
        });
        same || self.origins.iter().any(|known| known == "*" || *known == origin)
    }
}

fn stands_for(known: &str, host: &str) -> bool {
    match known.strip_prefix("*.") {
        Some(above) => host.strip_suffix(above).is_some_and(|below| below.len() > 1 && below.ends_with('.')),
        None => known == "*" || known == host,
    }
}

/// Host and port, if there is one. An IPv6 address keeps its brackets.
fn split_port(authority: &str) -> (&str, &str) {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !host.ends_with(':') => {
            (host, port)
        }
        _ => (authority, ""),
    }
}

/// What is needed to let requests in.
#[derive(Debug)]
pub(super) struct Entrance {
    names: Names,
    limits: Arc<DoorLimits>,
    methods: Methods,
    /// By which callers are identified, if they are.
    credentials: Option<Credentials>,
}

/// Why a request is not let in.
#[derive(Debug, PartialEq, Eq)]
struct Unwanted {
    code: StatusCode,
    error: String,
    hint: &'static str,
}

impl Unwanted {
    fn new(code: StatusCode, error: impl Into<String>, hint: &'static str) -> Self {
        Self { code, error: error.into(), hint }
    }

    /// For a caller that speaks gRPC, or for everyone else.
    fn answer(self, is_grpc: bool) -> Response {
        if !is_grpc {
            let refused = Refused::new(self.error, self.hint);
            return replication::refusal(self.code, Reason::Invalid, None, &refused);
        }
        let code = match self.code {
            StatusCode::FORBIDDEN => tonic::Code::PermissionDenied,
            _ => tonic::Code::InvalidArgument,
        };
        let message = format!("{}: {}", self.error, self.hint);
        let failure = Failure { code: code.into(), ..failure::invalid(&message) };
        let mut answer = tonic::Status::from(failure).into_http();
        *answer.status_mut() = self.code;
        answer
    }
}

/// Lets a request in or refuses it, and counts it as long as it is under way.
pub(super) async fn enter(State(entrance): State<Arc<Entrance>>, request: Request, next: Next) -> Response {
    let Some(caller) = request.extensions().get::<Arc<Caller>>().cloned() else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let under_way = caller.begin();
    let limits = &entrance.limits;
    let (path, is_grpc) = (request.uri().path(), is_grpc(request.headers()));
    let operators = is_for_operators(path);
    let unsent = limits.unsent_bytes;
    if operators && caller.places().held(Held::Unsent) >= unsent.all {
        // Who asks for such pages does not wait for those that take nothing.
        caller.places().close_largest_stalled(SHORTAGE_PATIENCE);
    }
    // Sessions fill a page, and are looked up by all who ask before any is answered.
    let answer = || Built::new(caller.clone(), OPERATORS_ANSWER_BYTES);
    let reserved = (path == LIST_SESSIONS && caller.holds(Held::Unsent) < unsent.each).then(answer);
    let admitted = match entrance.check(&request) {
        Ok(()) => identified::admit(entrance.credentials.as_ref(), &request, &caller),
        Err(unwanted) => Err(unwanted.answer(is_grpc && request.version() == Version::HTTP_2)),
    };
    let keeps_place =
        admitted.as_ref().is_ok_and(|admitted| admitted.keeps_place(entrance.credentials.as_ref()));
    // One that is refused, or asks for what everybody may ask for, and does not read the answer, keeps no place from others.
    let keeps_place = keeps_place || entrance.credentials.is_none();
    let mut response = match admitted {
        // Without reading what else comes: it is not wanted.
        Err(refused) => refused,
        Ok(_) if !operators && caller.is_reserved() && !caller.promote() => {
            too_many(failure::no_place(caller.places().counts().limit), is_grpc)
        }
        Ok(_) if operators && reserved.is_none() && caller.holds(Held::Unsent) >= unsent.each => {
            too_many(failure::too_much_unsent(unsent), is_grpc)
        }
        Ok(admitted) => {
            let framing = framing(&entrance.methods, path, is_grpc);
            let arriving = |body| Body::new(Arriving::new(body, caller.clone(), limits.clone(), framing));
            let grace =
                if entrance.methods.is_pipeline(path) { identified::PIPELINE_GRACE } else { Duration::ZERO };
            admitted.serve(request.map(arriving), next, grace).await
        }
    };
    let built = response.extensions_mut().remove::<Built>().or(reserved);
    let built = built.or_else(|| (operators && is_grpc).then(answer));
    let leaving = |body| {
        Body::new(Leaving::new(
            body,
            built,
            keeps_place.then_some(under_way),
            caller,
            limits.clone(),
            !operators,
        ))
    };
    response.map(leaving)
}

/// A refusal of what would be too much at a time.
fn too_many(refused: Failure, is_grpc: bool) -> Response {
    match is_grpc {
        true => tonic::Status::from(refused).into_http(),
        false => {
            let (code, reason) = (StatusCode::TOO_MANY_REQUESTS, Reason::LimitReached);
            let refused = Refused::new(refused.message, "try again, or another node");
            replication::refusal(code, reason, None, &refused)
        }
    }
}

/// What probes and operators ask: little, and answered soon.
fn is_for_operators(path: &str) -> bool {
    const PAGES: [&str; 4] = ["/livez", "/readyz", "/metrics", "/stats"];
    let service = path.strip_prefix('/').and_then(|path| path.split_once('/'));
    PAGES.contains(&path)
        || path.starts_with("/replication/")
        || path == "/grpc.health.v1.Health/Check"
        || service.is_some_and(|(service, _)| service == ADMIN)
}

fn framing(methods: &Methods, path: &str, is_grpc: bool) -> Framing {
    match is_grpc {
        true if methods.is_pipeline(path) || path == SUBSCRIBE_PATH => Framing::Pipeline,
        true if path.starts_with("/grpc.reflection.") => Framing::Pipeline,
        true => Framing::Message,
        false => Framing::Plain,
    }
}

impl Entrance {
    pub(super) fn new(
        names: Names,
        limits: Arc<DoorLimits>,
        methods: Methods,
        credentials: Option<Credentials>,
    ) -> Arc<Self> {
        Arc::new(Self { names, limits, methods, credentials })
    }

    fn check<B>(&self, request: &axum::http::Request<B>) -> Result<(), Unwanted> {
        let headers = request.headers();
        let authority = authority(request.uri(), headers)?;
        if let Some(authority) = authority
            && !self.names.knows_host(authority)
        {
            return Err(Unwanted::new(
                StatusCode::FORBIDDEN,
                format!("this node is not known as \"{}\"", echoed(authority)),
                "use an address or the name that the node advertises, or start it with --allowed-hosts",
            ));
        }
        for origin in headers.get_all(header::ORIGIN) {
            let known = origin.to_str().is_ok_and(|origin| self.names.knows_origin(origin, authority));
            if !known {
                return Err(Unwanted::new(
                    StatusCode::FORBIDDEN,
                    format!(
                        "pages of {} may not use this node",
                        echoed(&String::from_utf8_lossy(origin.as_bytes()))
                    ),
                    "start the node with --allowed-origins to let them",
                ));
            }
        }
        match is_grpc_path(request.uri().path()) {
            true => check_grpc(request),
            false => check_json(request),
        }
    }
}

/// Whom the request is for, as far as it says so.
fn authority<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Result<Option<&'a str>, Unwanted> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (host, another) = (hosts.next(), hosts.next());
    let unreadable = || {
        Unwanted::new(
            StatusCode::BAD_REQUEST,
            "the Host of the request cannot be read",
            "name the node once, as host:port",
        )
    };
    if another.is_some() {
        return Err(unreadable());
    }
    let host = host.map(|host| host.to_str().map_err(|_| unreadable())).transpose()?;
    // HTTP/2 has it in the address. One that says both must mean the same by them.
    match (uri.authority(), host) {
        (Some(authority), Some(host)) if !authority.as_str().eq_ignore_ascii_case(host) => Err(unreadable()),
        (Some(authority), _) => Ok(Some(authority.as_str())),
        (None, host) => Ok(host),
    }
}

fn echoed(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(ECHOED_CHARS).collect()
}

/// Pages have no dot in the first part of their paths; services have.
fn is_grpc_path(path: &str) -> bool {
    let first = path.strip_prefix('/').and_then(|path| path.split('/').next());
    first.is_some_and(|first| first.contains('.'))
}

fn check_grpc<B>(request: &axum::http::Request<B>) -> Result<(), Unwanted> {
    const HINT: &str = "call it by gRPC: POST of application/grpc over HTTP/2";
    if !is_grpc(request.headers()) {
        let error = format!("{} is not sent as application/grpc", echoed(request.uri().path()));
        return Err(Unwanted::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, error, HINT));
    }
    if request.version() != Version::HTTP_2 {
        let error = format!("{} is not sent over HTTP/2", echoed(request.uri().path()));
        return Err(Unwanted::new(StatusCode::HTTP_VERSION_NOT_SUPPORTED, error, HINT));
    }
    match *request.method() == Method::POST {
        true => Ok(()),
        false => Err(Unwanted::new(StatusCode::METHOD_NOT_ALLOWED, "a call is not made by POST", HINT)),
    }
}

fn check_json<B>(request: &axum::http::Request<B>) -> Result<(), Unwanted> {
    // Calls of services that do not exist are told so by gRPC.
    let harmless = [Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method());
    let grpc = is_grpc(request.headers()) && request.version() == Version::HTTP_2;
    match harmless || grpc || content_type(request.headers()) == "application/json" {
        true => Ok(()),
        false => Err(Unwanted::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "what is sent is not application/json",
            "send it with Content-Type: application/json",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn methods() -> Methods {
        Methods::new(&[], &[], ["/quorate.v1.Some/Pipeline".to_owned()])
    }

    fn entrance() -> Entrance {
        let names = Names::new(
            ["LB.example.com".to_owned(), "*.quorate.internal".to_owned()],
            ["https://console.example.com/".to_owned()],
        );
        let names = names.and_host_of("node1.example.com:7801");
        Entrance { names, limits: Arc::default(), methods: methods(), credentials: None }
    }

    #[test]
    fn hosts_are_addresses_or_known_names() {
        let names = entrance().names;
        for host in [
            "127.0.0.1:7801",
            "10.1.2.3",
            "[::1]:7801",
            "[fe80::1%eth0]:80",
            "localhost",
            "LOCALHOST:1",
            "a.localhost",
            "node1.example.com:9999",
            "node1.example.com.",
            "lb.example.com",
            "a.quorate.internal:7801",
        ] {
            assert!(names.knows_host(host), "{host}");
        }
        for host in [
            "",
            ":7801",
            "evil.example",
            "evil.example:7801",
            "node1.example.com.evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "1.2.3",
            "[::1",
            "[evil]:1",
            "quorate.internal",
            "xquorate.internal",
            ".quorate.internal",
            "node1",
            "example.com",
        ] {
            assert!(!names.knows_host(host), "{host}");
        }
        assert!(Names::new(["*".to_owned()], []).knows_host("evil.example"));
    }

    #[test]
    fn origins_are_the_host_itself_or_known() {
        let names = entrance().names;
        for (origin, authority, known) in [
            ("http://127.0.0.1:7801", Some("127.0.0.1:7801"), true),
            ("https://LB.example.com", Some("lb.example.com"), true),
            ("https://console.example.com", Some("lb.example.com"), true),
            ("http://127.0.0.1:8080", Some("127.0.0.1:7801"), false),
            ("null", Some("127.0.0.1:7801"), false),
            ("null", None, false),
            ("http://evil.example", Some("127.0.0.1:7801"), false),
            ("https://console.example.com.evil.example", Some("lb.example.com"), false),
        ] {
            assert_eq!(names.knows_origin(origin, authority), known, "{origin} {authority:?}");
        }
        assert!(Names::new([], ["*".to_owned()]).knows_origin("null", None));
    }

    #[test]
    fn requests_that_a_page_could_send_unasked_are_refused() {
        let entrance = entrance();
        let check = |method: &str, path: &str, version: Version, headers: &[(&str, &str)]| {
            let mut request = axum::http::Request::builder().method(method).uri(path).version(version);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            entrance.check(&request.body(()).unwrap()).map_err(|unwanted| unwanted.code.as_u16())
        };
        const HOST: (&str, &str) = ("host", "127.0.0.1:7801");
        const GRPC: (&str, &str) = ("content-type", "application/grpc");
        const JSON: (&str, &str) = ("content-type", "application/json; charset=utf-8");
        const TEXT: (&str, &str) = ("content-type", "text/plain");
        let (one, two) = (Version::HTTP_11, Version::HTTP_2);
        for path in [
            "/quorate.v1.Some/Put",
            "/quorate.v1.Admin/Configure",
            "/quorate.v2.Some/Put",
            "/grpc.health.v1.Health/Check",
        ] {
            for (version, headers, expected) in [
                (two, &[GRPC][..], Ok(())),
                (two, &[("content-type", "application/grpc+proto")], Ok(())),
                (one, &[HOST, GRPC], Err(505)),
                (one, &[HOST, TEXT], Err(415)),
                (two, &[HOST, TEXT], Err(415)),
                (two, &[HOST], Err(415)),
                (two, &[HOST, ("content-type", "application/grpc-web")], Err(415)),
                (two, &[HOST, JSON], Err(415)),
                (two, &[GRPC, HOST, ("origin", "http://evil.example")], Err(403)),
                (two, &[GRPC, ("host", "evil.example")], Err(403)),
                (two, &[GRPC, HOST, ("host", "127.0.0.1")], Err(400)),
            ] {
                assert_eq!(check("POST", path, version, headers), expected, "{path} {version:?} {headers:?}");
            }
            assert_eq!(check("GET", path, two, &[GRPC]), Err(405));
        }
        for path in ["/replication/configure", "/nowhere"] {
            assert_eq!(check("POST", path, one, &[HOST, JSON]), Ok(()));
            assert_eq!(check("POST", path, one, &[HOST, TEXT]), Err(415));
            assert_eq!(check("POST", path, one, &[HOST]), Err(415));
            assert_eq!(check("POST", path, one, &[HOST, JSON, ("origin", "null")]), Err(403));
            assert_eq!(check("POST", path, one, &[JSON, ("host", "evil.example")]), Err(403));
        }
        assert_eq!(check("GET", "/metrics", one, &[HOST]), Ok(()));
        assert_eq!(check("GET", "/livez", Version::HTTP_10, &[]), Ok(()), "no browser leaves it out");
        assert_eq!(check("GET", "/metrics", one, &[("host", "evil.example:7801")]), Err(403));
        assert_eq!(check("GET", "/metrics", one, &[("host", "")]), Err(403));
        assert_eq!(check("GET", "http://evil.example/metrics", two, &[]), Err(403));
        assert_eq!(check("GET", "http://localhost:1/metrics", two, &[HOST]), Err(400), "two hosts");
    }

    #[test]
    fn probes_and_operators_are_told_by_what_they_ask_for() {
        for path in [
            "/livez",
            "/readyz",
            "/metrics",
            "/replication/status",
            "/quorate.v1.Admin/Status",
            "/grpc.health.v1.Health/Check",
        ] {
            assert!(is_for_operators(path), "{path}");
        }
        for path in
            ["/quorate.v1.Some/Put", "/quorate.v1.Some/Watch", "/grpc.health.v1.Health/Watch", "/livez/", "/"]
        {
            assert!(!is_for_operators(path), "{path}");
        }
        let framing = |path, is_grpc| framing(&methods(), path, is_grpc);
        assert_eq!(framing("/quorate.v1.Some/Pipeline", true), Framing::Pipeline);
        assert_eq!(
            framing("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", true),
            Framing::Pipeline
        );
        assert_eq!(framing("/quorate.v1.Some/Put", true), Framing::Message);
        assert_eq!(framing("/quorate.v1.Other/Pipeline", true), Framing::Message);
        assert_eq!(framing("/replication/configure", false), Framing::Plain);
    }
}
