from pregate.cluster.leases import LEASE_TTL_S, RENEW_EVERY_S, Leases


def test_a_lease_lives_while_it_is_renewed():
    leases = Leases(ttl_s=10)
    leases.take("serve", now_s=0)
    for now_s in (2, 11, 20.5):
        assert leases.renew("serve", now_s)
    assert leases.lapse(30) == []
    assert leases.lapse(30.5) == ["serve"]
    assert not leases


def test_a_lapsed_lease_cannot_be_renewed_even_before_it_is_swept():
    leases = Leases(ttl_s=10)
    leases.take("serve", now_s=0)
    assert not leases.renew("serve", 10)
    assert not leases.renew("stranger", 0)
    assert leases.lapse(10) == ["serve"]


def test_the_last_of_two_holds_the_deployment():
    leases = Leases(ttl_s=10)
    leases.take("serve", now_s=0)
    leases.take("app", now_s=5)
    assert leases.release("serve")
    assert not leases.release("serve")
    assert leases.holders == ("app",)
    assert leases.lapse(14.9) == []
    assert leases
    assert leases.lapse(15) == ["app"]


def test_taking_again_renews():
    leases = Leases(ttl_s=10)
    leases.take("serve", now_s=0)
    leases.take("serve", now_s=9)
    assert leases.lapse(18) == []


def test_several_renewals_fit_into_one_life():
    assert LEASE_TTL_S / RENEW_EVERY_S >= 3
