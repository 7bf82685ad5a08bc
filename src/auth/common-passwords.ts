/** The most common passwords of eight characters and more, by the lists of leaked ones; what guessers try first. */
export const COMMON_PASSWORDS: ReadonlySet<string> = new Set(
  `12345678 123456789 1234567890 12345678910 0123456789 9876543210 987654321 87654321 123123123 123321123 112233445566
  11223344 1122334455 12341234 12344321 123456123 123654789 147258369 159357258 159753456 789456123 741852963 963852741
  password password1 password12 password123 password1234 password! password1! passw0rd p@ssword p@ssw0rd p@ssw0rd1 pa$$word
  pass1234 pass12345 passport password2 password3 mypassword newpassword changeme changeme1 changeme123 letmein1 letmein123
  welcome1 welcome12 welcome123 welcome1! admin123 admin1234 admin12345 administrator adminadmin root1234 rootroot toor1234
  qwertyui qwertyuiop qwerty12 qwerty123 qwerty1234 qwerty12345 qwerty123456 qwertyqwerty 1qaz2wsx 1qaz2wsx3edc qazwsxedc
  zaq12wsx zaq1zaq1 qazwsx123 asdfghjk asdfghjkl asdf1234 asdfasdf zxcvbnm1 zxcvbnm123 zxcvbnmz q1w2e3r4 q1w2e3r4t5
  1q2w3e4r 1q2w3e4r5t 1q2w3e4r5t6y a1b2c3d4 a1s2d3f4 abcd1234 abc12345 abc123456 abcdefgh abcdefg1 aa123456 aaa111222
  iloveyou iloveyou1 iloveyou2 iloveyou! iloveu123 sunshine sunshine1 princess princess1 football football1 baseball
  baseball1 basketball superman superman1 batman123 spiderman starwars starwars1 pokemon1 pokemon123 michael1 michelle
  jennifer jordan23 jessica1 charlie1 ashley123 daniel123 monkey123 dragon123 shadow123 master123 hunter123 killer123
  whatever whatever1 trustno1 computer computer1 internet samsung1 samsung123 liverpool liverpool1 chelsea1 arsenal1
  barcelona manchester realmadrid juventus corvette mercedes porsche911 mustang1 midnight midnight1 november december
  february september summer2024 summer2025 summer2026 winter2024 winter2025 winter2026 spring2025 spring2026 autumn2025
  hello123 hello1234 hellohello goodluck goodmorning blessed1 loveyou1 lovelove secret123 secretsecret test1234 test12345
  testtest testing1 testing123 tester123 user1234 user12345 username guest123 guestguest default1 demo1234 demodemo
  server123 oracle123 postgres postgres1 postgres123 mysql123 redis123 docker123 muster123 company1 company123 temp1234
  temporary temp12345 asdfqwer qweasdzxc qweasd123 qwe12345 qwer1234 qwerasdf 1234qwer 123qweasd 123qwe123 qwe123qwe
  1234abcd 12345abc 123abc123 11111111 111111111 1111111111 00000000 000000000 22222222 33333333 55555555 66666666 77777777
  88888888 888888888 99999999 999999999 12121212 13131313 69696969 10101010 20202020 01234567 012345678 11112222 11111112
  19841984 19851985 19861986 19871987 19881988 19891989 19901990 19911991 19921992 20002000 aaaaaaaa zzzzzzzz xxxxxxxx
  abcabcabc abc123abc alexander alexandra anthony1 benjamin brittany catherine chocolate christian christopher
  elizabeth francisco gabriella guillermo isabella jasmine1 jonathan juliette kimberly leonardo lorraine margaret
  maverick montana1 natalie1 nicholas patricia peekaboo penelope rebecca1 richard1 samantha santiago savannah sebastian
  september1 sophie123 stephanie thompson valentina veronica victoria vincent1 william1 winston1 butterfly cheesecake
  creative diamonds elephant fireball freedom1 friends1 godzilla gorgeous greenday hannah123 happiness harley123 heaven123
  honeybee lollipop lucky123 metallica minecraft moonlight mountain nirvana1 paradise platinum precious qwertzui qwertzuiop
  rainbow1 scorpion security skywalker slipknot snowball snowflake softball soccer123 spongebob strawberry sweetheart
  swordfish teddybear terminator tinkerbell tomorrow universe vacation valentine warcraft wildcats wonderful yellow123`.split(
    /\s+/,
  ),
);
