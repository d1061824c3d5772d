//! Keys of a tenant and a collection, by callers to whom others are granted.

use prost::Message as _;
use quorate::testkit::proto::replication::replication_service_client::ReplicationServiceClient;
use quorate::testkit::proto::replication::{EntriesRequest, Filter, SubscribeRequest};
use quorate::testkit::proto::v1::answer::Content as Answered;
use quorate::testkit::proto::v1::call::Content;
use quorate::testkit::proto::v1::compare::Target;
use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::pipeline_client::PipelineClient;
use quorate::testkit::proto::v1::tagged_request::Request as Tagged;
use quorate::testkit::proto::v1::tagged_response::Response as TaggedAnswer;
use quorate::testkit::proto::v1::txn_operation::Operation;
use quorate::testkit::proto::v1::{
    Call, Compare, DeleteRangeRequest, DeleteRequest, GetRequest, OpenSessionRequest, PipelineCalls,
    PipelineRequest, PutRequest, RangeRequest, Reason, TaggedRequest, TxnGet, TxnOperation, TxnPut,
    TxnRequest, WatchRequest,
};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{TestToken, by, guarded, root};
use crate::channel;

const TENANT: &str = "acme";

fn tokens() -> [TestToken; 4] {
    let of = |prefix: &str, rights: &str| {
        format!("grants = [{{ tenant = \"{TENANT}\", prefix = \"{prefix}\", rights = [{rights}] }}]")
    };
    [
        root(),
        TestToken::new("reader", &of("orders", "\"read\"")),
        TestToken::new("writer", &of("orders", "\"write\"")),
        TestToken::new("follower", &of("orders", "\"subscribe\"")),
    ]
}

fn put(collection: &str) -> PutRequest {
    PutRequest {
        tenant: TENANT.into(),
        collection: collection.into(),
        key: "k".into(),
        value: "v".into(),
        ..Default::default()
    }
}

fn get(collection: &str) -> GetRequest {
    GetRequest { tenant: TENANT.into(), collection: collection.into(), key: "k".into(), ..Default::default() }
}

fn code<T>(answer: Result<T, Status>) -> Code {
    answer.err().map_or(Code::Ok, |status| status.code())
}

async fn kv(address: std::net::SocketAddr) -> KvClient<Channel> {
    KvClient::new(channel(address).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_read_and_written_by_those_to_whom_its_collection_is_granted() {
    guarded(&tokens(), "", async |address, _| {
        let [root, reader, writer, follower] = tokens().map(|token| token.secret());
        let mut kv = kv(address).await;
        for collection in ["orders", "orders-old", "stock"] {
            kv.put(by(&root, put(collection))).await.unwrap();
        }
        const DENIED: Code = Code::PermissionDenied;
        for (token, collection, reads, writes) in [
            (&reader, "orders", Code::Ok, DENIED),
            (&reader, "orders-old", Code::Ok, DENIED),
            (&reader, "stock", DENIED, DENIED),
            (&reader, "", DENIED, DENIED),
            (&writer, "orders", DENIED, Code::Ok),
            (&writer, "stock", DENIED, DENIED),
            (&follower, "orders", DENIED, DENIED),
        ] {
            let (tenant, of) = (TENANT.to_owned(), collection.to_owned());
            let range = RangeRequest { tenant: tenant.clone(), collection: of.clone(), ..Default::default() };
            assert_eq!(code(kv.get(by(token, get(collection))).await), reads, "{token} {collection}");
            assert_eq!(code(kv.range(by(token, range.clone())).await), reads, "{token} {collection}");
            assert_eq!(code(kv.range_stream(by(token, range)).await), reads, "{token} {collection}");
            let watch = WatchRequest { tenant: tenant.clone(), collection: of.clone(), ..Default::default() };
            assert_eq!(code(kv.watch(by(token, watch)).await), reads, "{token} {collection}");
            let delete = DeleteRequest {
                tenant: tenant.clone(),
                collection: of.clone(),
                key: "gone".into(),
                ..Default::default()
            };
            let deleted =
                DeleteRangeRequest { tenant, collection: of, start: "x".into(), ..Default::default() };
            assert_eq!(code(kv.put(by(token, put(collection))).await), writes, "{token} {collection}");
            assert_eq!(code(kv.delete(by(token, delete)).await), writes, "{token} {collection}");
            assert_eq!(code(kv.delete_range(by(token, deleted)).await), writes, "{token} {collection}");
        }
        // Another tenant, the default one included.
        let of_other = GetRequest { tenant: String::new(), ..get("orders") };
        assert_eq!(code(kv.get(by(&reader, of_other)).await), DENIED);
        assert_eq!(code(kv.open_session(by(&writer, OpenSessionRequest::default())).await), Code::Ok);
        assert_eq!(code(kv.open_session(by(&reader, OpenSessionRequest::default())).await), DENIED);
        // That a key is there and that it is not are the same to whom it is not granted.
        let there = kv.get(by(&reader, get("stock"))).await.unwrap_err();
        let not_there = kv.get(by(&reader, get("nothing"))).await.unwrap_err();
        assert_eq!(there.message(), not_there.message());
    })
    .await;
}

fn txn(collection: &str, compares: &[&str], operations: Vec<TxnOperation>) -> TxnRequest {
    let compare = |of: &&str| Compare {
        collection: (*of).into(),
        key: "k".into(),
        target: Some(Target::Version(0)),
        ..Default::default()
    };
    let (success, failure) = (operations.clone(), operations);
    TxnRequest {
        tenant: TENANT.into(),
        collection: collection.into(),
        compare: compares.iter().map(compare).collect(),
        success,
        failure,
        ..Default::default()
    }
}

fn reads(of: &str) -> TxnOperation {
    TxnOperation { collection: of.into(), operation: Some(Operation::Get(TxnGet { key: "k".into() })) }
}

fn writes(of: &str) -> TxnOperation {
    let put = TxnPut { key: "k".into(), value: "v".into(), ttl_ms: 0 };
    TxnOperation { collection: of.into(), operation: Some(Operation::Put(put)) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_takes_the_right_of_each_of_its_parts() {
    let both = format!(
        "grants = [{{ tenant = \"{TENANT}\", prefix = \"orders\", rights = [\"read\", \"write\"] }}, {{ tenant = \"{TENANT}\", prefix = \"stock\", rights = [\"read\"] }}]"
    );
    let tokens = [root(), TestToken::new("both", &both)];
    guarded(&tokens, "", async |address, _| {
        let (mut kv, both) = (kv(address).await, tokens[1].secret());
        for (request, is_granted) in [
            (txn("orders", &[], vec![writes("")]), true),
            (txn("orders", &["stock"], vec![writes(""), reads("stock")]), true),
            (txn("stock", &[], vec![writes("orders")]), true),
            (txn("orders", &["secret"], vec![writes("")]), false),
            (txn("orders", &[], vec![writes(""), reads("secret")]), false),
            (txn("orders", &[], vec![writes(""), writes("stock")]), false),
            (txn("stock", &[], vec![writes("")]), false),
            (txn("orders", &[], vec![reads("")]), true),
            // It travels through the log, for which a reader has no right.
            (txn("stock", &[], vec![reads("")]), false),
            (TxnRequest { failure: vec![reads("secret")], ..txn("orders", &[], vec![writes("")]) }, false),
            (TxnRequest { tenant: "other".into(), ..txn("orders", &[], vec![writes("")]) }, false),
        ] {
            let expected = if is_granted { Code::Ok } else { Code::PermissionDenied };
            assert_eq!(code(kv.txn(by(&both, request.clone())).await), expected, "{request:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_a_pipeline_are_looked_at_one_by_one() {
    guarded(&tokens(), "", async |address, _| {
        let writer = tokens()[2].secret();
        let requests = [
            Tagged::Put(put("orders")),
            Tagged::Put(put("stock")),
            Tagged::Get(get("orders")),
            Tagged::OpenSession(OpenSessionRequest::default()),
        ];
        let tagged = (1..).zip(requests).map(|(tag, request)| TaggedRequest { tag, request: Some(request) });
        let message = PipelineRequest { requests: tagged.collect() };
        let mut answers = kv(address)
            .await
            .pipeline(by(&writer, tokio_stream::iter([message])))
            .await
            .unwrap()
            .into_inner();
        let mut denied = Vec::new();
        let mut done = Vec::new();
        while let Some(message) = answers.message().await.unwrap() {
            for answer in message.responses {
                match answer.response.unwrap() {
                    TaggedAnswer::Failure(failure) => {
                        assert_eq!(failure.reason(), Reason::PermissionDenied, "{failure:?}");
                        denied.push(answer.tag);
                    }
                    _ => done.push(answer.tag),
                }
            }
        }
        denied.sort_unstable();
        done.sort_unstable();
        assert_eq!((denied, done), (vec![2, 3], vec![1, 4]));
        // The same by the names of methods.
        let call = |tag, method: &str, payload: Vec<u8>| Call {
            tag,
            method: method.into(),
            content: Some(Content::Payload(payload.into())),
            ..Default::default()
        };
        let calls = vec![
            call(1, "put", put("orders").encode_to_vec()),
            call(2, "put", put("stock").encode_to_vec()),
            call(3, "get", get("orders").encode_to_vec()),
        ];
        let message = PipelineCalls { calls };
        let mut pipeline = PipelineClient::new(channel(address).await);
        let mut answers =
            pipeline.run(by(&writer, tokio_stream::iter([message]))).await.unwrap().into_inner();
        let mut granted = Vec::new();
        while let Some(message) = answers.message().await.unwrap() {
            for answer in message.answers {
                if let Some(Answered::Failure(failure)) = &answer.content {
                    assert_eq!(failure.reason(), Reason::PermissionDenied, "{failure:?}");
                } else {
                    granted.push(answer.tag);
                }
            }
        }
        assert_eq!(granted, [1]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_followed_is_what_may_be() {
    guarded(&tokens(), "", async |address, _| {
        let [root, reader, _, follower] = tokens().map(|token| token.secret());
        kv(address).await.put(by(&root, put("orders"))).await.unwrap();
        let mut service = ReplicationServiceClient::new(channel(address).await);
        let filter = |tenant: &str, collection: &str| Filter {
            tenant_id: tenant.into(),
            collection: collection.into(),
        };
        for (token, filters, is_granted) in [
            (&follower, vec![filter(TENANT, "orders")], true),
            (&follower, vec![filter(TENANT, "orders"), filter(TENANT, "orders-old")], true),
            (&follower, vec![filter(TENANT, "orders"), filter(TENANT, "stock")], false),
            (&follower, vec![filter(TENANT, "")], false),
            (&follower, vec![], false),
            (&reader, vec![filter(TENANT, "orders")], false),
            (&root, vec![], true),
        ] {
            let expected = if is_granted { Code::Ok } else { Code::PermissionDenied };
            let entries = EntriesRequest { filters: filters.clone(), ..Default::default() };
            assert_eq!(code(service.get_entries_after(by(token, entries)).await), expected, "{filters:?}");
            let first =
                SubscribeRequest { filters: filters.clone(), heartbeat_ms: 100, ..Default::default() };
            let asked = tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
            let mut entries = service.subscribe(by(token, asked)).await.unwrap().into_inner();
            assert_eq!(code(entries.message().await), expected, "{filters:?}");
        }
    })
    .await;
}
